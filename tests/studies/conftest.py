"""Runs that train in no time: what surrounds the training is the subject here."""

import json
from pathlib import Path

import pytest

from gemma2_jax.checkpoints.integrity import write_checkpoint_manifest
from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE
from gemma2_jax.cli.compose import compose
from gemma2_jax.config import save_config
from gemma2_jax.distill.teacher_record import TEACHER_FILE
from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.run import RunConfig
from gemma2_jax.studies import stages
from gemma2_jax.training import start
from gemma2_jax.training.start import DATA_FILE


class Stage:
    """Replaces preparing, training, evaluating and sampling, and records their calls.

    A run's loss is its learning rate, so that a test can say which is best.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails: dict[str, BaseException] = {}

    def prepare(self, data, tokenizer):
        self.calls.append(("prepare", data.folder))

    def train(self, config: RunConfig, until: int | None = None) -> None:
        self.calls.append(("train", config.name))
        last = config.training.steps if until is None else until
        folder = Path(config.output)
        save_config(config, folder / CONFIG_FILE)
        if config.name in self.fails:
            raise self.fails[config.name]
        checkpoint = folder / "checkpoints" / str(last)
        for file in (folder / TOKENIZER_FILE, folder / DATA_FILE, checkpoint / "params" / "_METADATA"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"documents": config.data.folder}) if file.name == DATA_FILE else "{}")
        if config.distill.has_teacher:
            (folder / TEACHER_FILE).write_text('{"identity": "0"}')
        write_checkpoint_manifest(checkpoint)
        rows = [
            {
                "step": step,
                "split": split,
                "cross_entropy": config.optimizer.learning_rate + 1 / step,
                **({"tokens_per_second": 1000 + step} if split == "train" else {}),
            }
            for step in range(10, last + 1, 10)
            for split in ("train", "validation")
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(self, folder: str, teacher: str | None = None) -> Evaluation:
        self.calls.append(("evaluate", Path(folder).name))
        loss = stages.load_config(RunConfig, Path(folder) / CONFIG_FILE).optimizer.learning_rate
        compared = (None, None) if teacher is None else (0.75, 0.125)
        return Evaluation(12345, 67890, loss, 2.0, *compared)

    def sample(self, config, prompts, sample_tokens):
        self.calls.append(("sample", config.name))
        return [f"{config.name} goes `on`|\nhere [bold]" for _ in prompts]


@pytest.fixture
def stage(monkeypatch, tmp_path) -> Stage:
    stand_in = Stage()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "prepare", stand_in.prepare)
    monkeypatch.setattr(stages, "train", stand_in.train)
    monkeypatch.setattr(stages, "evaluate_run", stand_in.evaluate)
    monkeypatch.setattr(stages, "_continue", stand_in.sample)
    for module in (stages, start):
        monkeypatch.setattr(module, "data_identity", lambda data: {"documents": data.folder})
    return stand_in


@pytest.fixture
def toy():
    """Composes a small run whose output folder is in the current folder."""

    def make(name: str, *overrides: str) -> RunConfig:
        small = ["model=toy", "training.steps=40", "optimizer.warmup_steps=1", "training.eval_every=10"]
        return compose([*small, *overrides], values={"name": name, "output": f"out/{name}"})

    return make
