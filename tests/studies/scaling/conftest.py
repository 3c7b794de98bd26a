"""Run folders with the losses of a known law, without any training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import save_config
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.scaling.fit import Curve
from gemma2_jax.studies.scaling.laws import SUPERVISED, distillation_law
from gemma2_jax.training.start import DATA_FILE

TRUE = {"E": 1.7, "A": 40.0, "B": 300.0, "alpha": 0.3, "beta": 0.45}
WIDTHS = (32, 256, 2048, 16384)
STEPS = (100, 300, 1000, 3000)


@pytest.fixture(scope="session")
def true_student() -> tuple[Curve, dict[str, float]]:
    """A distillation law above `TRUE`, and its parameters."""
    law = distillation_law(TRUE)
    values = dict(zip(law.names, (1.2, 20.0, 1.4, 0.2, 60.0, 400.0, 0.3, 0.5, 0.8), strict=True))
    return Curve(law, values, 3.0), values


class Runs:
    """Writes finished runs."""

    def __init__(self, folder: Path, like: RunConfig) -> None:
        self.folder, self._like = folder, like

    def write(
        self,
        name: str,
        width: int = 32,
        steps: int = 100,
        loss: float | None = None,
        teacher: str | None = None,
        documents: str = "d",
        tokenizer: str = "t",
        done: int | None = None,
    ) -> Path:
        """Writes a run; without a loss, that of `TRUE`."""
        config, folder = self._like, self.folder / name
        config = replace(
            config,
            name=name,
            output=str(folder),
            model=replace(config.model, d_ff=width),
            training=replace(config.training, steps=steps),
        )
        if teacher is not None:
            objective = ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48)
            config = replace(config, objective=objective, distill=replace(config.distill, teacher=teacher))
        tokens = steps * config.data.batch_size * config.data.seq_len
        n = count_parameters(config.model).total
        if loss is None:
            loss = float(Curve(SUPERVISED, TRUE).loss(np.array(n), np.array(tokens)))
        folder.mkdir(parents=True)
        save_config(config, folder / CONFIG_FILE)
        (folder / DATA_FILE).write_text(json.dumps({"documents": documents, "tokenizer": tokenizer}))
        last = steps if done is None else done
        rows = [
            {"step": last, "split": "train", "cross_entropy": loss, "tokens_seen": tokens},
            {"step": last, "split": "validation", "cross_entropy": loss, "targets": 5000},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def parameters(self, width: int, embedding: bool = True) -> int:
        counts = count_parameters(replace(self._like.model, d_ff=width))
        return counts.total if embedding else counts.non_embedding

    def tokens(self, steps: int) -> int:
        return steps * self._like.data.batch_size * self._like.data.seq_len

    def grid(
        self, prefix: str, loss: Callable[[int, int], float] | None = None, teacher: str | None = None
    ) -> None:
        """Writes a run for each of `WIDTHS` and `STEPS`; `loss` is a function of parameters and tokens."""
        for width in WIDTHS:
            for steps in STEPS:
                value = None if loss is None else loss(self.parameters(width), self.tokens(steps))
                self.write(f"{prefix}-{width}-{steps}", width, steps, value, teacher)


@pytest.fixture
def runs(tmp_path: Path, toy_run: RunConfig) -> Runs:
    return Runs(tmp_path / "runs", toy_run)


@pytest.fixture(scope="module")
def taught(
    tmp_path_factory: pytest.TempPathFactory, toy_run: RunConfig, true_student: tuple[Curve, dict[str, float]]
) -> Runs:
    """Runs from scratch and from two teachers of different losses, which are among those from scratch."""
    made = Runs(tmp_path_factory.mktemp("taught") / "study", toy_run)
    made.grid("scratch")
    curve, _ = true_student
    for width, steps in ((16384, 3000), (256, 1000)):
        teacher = made.folder / f"scratch-{width}-{steps}"
        known = float(
            Curve(SUPERVISED, TRUE).loss(np.array(made.parameters(width)), np.array(made.tokens(steps)))
        )
        students = Curve(curve.law, curve.parameters, known)

        def loss(n: float, d: float, at: Curve = students) -> float:
            return float(at.loss(np.array(n), np.array(d)))

        made.grid(f"from-{width}", loss, teacher=str(teacher))
    return made
