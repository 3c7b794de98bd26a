"""Run folders of studies and sweeps that were never trained."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma2_jax.cli.compose import compose
from gemma2_jax.config import to_dict

WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def plain_config() -> dict[str, Any]:
    """The configuration of a small run as plain data."""
    overrides = ["model=toy", "training.steps=40", "optimizer.warmup_steps=1", "training.log_every=10"]
    return to_dict(
        compose([*overrides, "data.batch_size=4", "data.seq_len=32"], values={"name": "toy", "output": "x"})
    )


@pytest.fixture
def write_run(tmp_path: Path, plain_config: dict[str, Any]) -> WriteRun:
    """Writes a run folder whose validation cross-entropy ends at `loss`."""

    def write(
        folder: str,
        loss: float | None = 4.0,
        changes: Mapping[str, Any] | None = None,
        steps: int = 40,
        name: str | None = None,
        **row: float,
    ) -> Path:
        config = copy.deepcopy(plain_config)
        config |= {"name": name or Path(folder).name, "output": folder}
        for key, value in (changes or {}).items():
            *above, last = key.split(".")
            section = config
            for part in above:
                section = section[part]
            section[last] = value
        path = tmp_path / folder
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        (path / "data.json").write_text('{"documents": "d", "tokenizer": "t"}')
        rows: list[dict[str, Any]] = []
        for step in range(10, steps + 1, 10):
            found = 5.0 if loss is None else loss + 1 / step - 1 / steps
            rows.append(
                {"step": step, "split": "train", "loss": found, "cross_entropy": found, "tokens_seen": step * 128,
                 "tokens_per_second": 64.0, "seconds": 20.0, **row}
            )  # fmt: skip
            if loss is not None and step % 20 == 0:
                rows.append({"step": step, "split": "validation", "cross_entropy": found, "perplexity": 2.0})
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def study(tmp_path: Path, write_run: WriteRun) -> Path:
    """A teacher at 2 nats, and with three seeds: scratch at 4, online students near 3, cached ones between."""
    write_run("study/teacher", 2.0, {"model.d_model": 64})
    online = {
        "distill.teacher": "elsewhere/teacher",
        "objective.cross_entropy": 0.0,
        "objective.forward_kl": 1.0,
    }
    for seed, (scratch, student, cached) in enumerate(
        [(4.0, 3.0, 3.5), (4.1, 3.05, 3.59), (3.9, 2.95, 3.41)]
    ):
        seeds = {"seed": seed, "data.seed": seed}
        write_run(f"study/scratch-{seed}", scratch, seeds)
        write_run(f"study/online-{seed}", student, {**seeds, **online})
        write_run(
            f"study/cached-{seed}", cached, {**seeds, **online, "distill.cache": f"elsewhere/caches/{seed}"}
        )
    results = {"title": "Which <source>?", "machine": "A machine, 2 cores", "runs": {}}
    (tmp_path / "study/results.json").write_text(json.dumps(results))
    return tmp_path / "study"


@pytest.fixture
def sweep(tmp_path: Path, write_run: WriteRun) -> Path:
    """Two keys with three and two values, two seeds; the first key matters most; one run failed."""
    results: list[dict[str, Any]] = []
    for rate in ("0.001", "0.01", "0.1"):
        for decay in ("0.0", "0.3"):
            for seed in ("0", "1"):
                values = {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay, "seed": seed}
                name = ",".join(f"{key}={value}" for key, value in values.items())
                if values == {"optimizer.learning_rate": "0.1", "optimizer.weight_decay": "0.3", "seed": "1"}:
                    results.append({"values": values, "error": "the loss is <nan>"})
                    continue
                loss = {"0.001": 4.0, "0.01": 3.0, "0.1": 9.0}[rate] + 0.1 * float(decay) + 0.01 * int(seed)
                changes = {key: float(value) for key, value in values.items() if key != "seed"}
                write_run(f"sweep/{name}", loss, {**changes, "seed": int(seed)}, name=name)
                results.append({"values": values, "cross_entropy": loss})
    (tmp_path / "sweep/results.json").write_text(json.dumps(results))
    return tmp_path / "sweep"
