"""What a run folder is asked about before it goes on, or is found to be done."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.checkpoints.store import CONFIG_FILE, latest_step
from gemma2_jax.config import UserError, save
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.sharding.layout import LayoutConfig
from gemma2_jax.training import loop
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.loop import train, train_together
from gemma2_jax.training.metrics import JSON_LINES
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.start import check_same_run, older_schedule
from tests.distill.test_cache import write_teacher


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.fixture(scope="module")
def done(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A student that is trained to its last step."""
    folder = tmp_path_factory.mktemp("done")
    config = replace(
        toy_run,
        output=str(folder / "run"),
        objective=ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher(toy_run, folder / "teacher", seed=1), "float32"),
        training=replace(toy_run.training, steps=2, eval_every=2),
        optimizer=replace(toy_run.optimizer, warmup_steps=1),
    )
    train(config)
    return config


def teacher(run: RunConfig, folder: Path, seed: int) -> str:
    return write_teacher(run, Gemma2.init(run.model, jax.random.key(seed)), folder)


def taught_by(config: RunConfig, teacher: str | Path) -> RunConfig:
    return replace(config, distill=replace(config.distill, teacher=str(teacher)))


def test_one_that_is_done_was_taught_by_the_same(
    done: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = teacher(done, tmp_path / "other", seed=2)
    with pytest.raises(
        UserError, match=r"was taught by other weights .* than those of distill\.teacher .*other"
    ):
        train(taught_by(done, other))
    train(taught_by(done, shutil.copytree(str(done.distill.teacher), tmp_path / "moved")))
    monkeypatch.setattr(loop, "Inputs", None)  # nobody is loaded who has the same name
    train(done)


def test_one_that_is_done_beside_one_that_is_not(done: RunConfig, tmp_path: Path) -> None:
    other = teacher(done, tmp_path / "other", seed=2)
    new = replace(taught_by(done, other), name="new", output=str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"was taught by other weights"):
        train_together([taught_by(done, other), new])
    assert latest_step(new.output) is None


def test_one_that_is_done_was_trained_on_the_same_text(done: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(done.data.folder, tmp_path / "data")
    moved = replace(done, data=replace(done.data, folder=str(folder)))
    train(moved)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"identity": "other"}))
    with pytest.raises(UserError, match="was trained on other documents or with another tokenizer"):
        train(moved)


def test_parts_of_a_layout_may_change(done: RunConfig, tmp_path: Path) -> None:
    begun = replace(done, output=str(tmp_path), distill=replace(done.distill, layout=LayoutConfig()))
    save(begun, tmp_path / CONFIG_FILE)
    gathered = LayoutConfig(weights={"D": ()})
    check_same_run(replace(begun, layout=gathered, distill=replace(begun.distill, layout=gathered)))
    with pytest.raises(
        UserError, match=r"holds a run with distill\.dtype=float32, and bfloat16 is asked for"
    ):
        check_same_run(replace(begun, distill=replace(begun.distill, dtype="bfloat16")))


def test_a_run_that_an_older_schedule_began_is_told(toy_run: RunConfig, tmp_path: Path) -> None:
    config = replace(toy_run, output=str(tmp_path))
    assert older_schedule(config, 4) is None  # there is nothing to compare with
    rate = learning_rate_schedule(config.optimizer, config.training.steps)
    for late, line in ((0, None), (1, "step 4 had the learning rate 0.009")):
        rows = [
            {"step": step, "split": "train", "learning_rate": float(rate(step - 1 - late))}
            for step in range(1, 9)
        ]
        (tmp_path / JSON_LINES).write_text("".join(json.dumps(row) + "\n" for row in rows))
        told = older_schedule(config, 4)
        assert told is None if line is None else line in (told or "")


def test_a_fraction_of_the_run_is_the_number_of_steps_that_it_comes_to(
    toy_run: RunConfig, tmp_path: Path
) -> None:
    begun = replace(toy_run, output=str(tmp_path))
    save(begun, tmp_path / CONFIG_FILE)
    check_same_run(replace(begun, optimizer=replace(begun.optimizer, warmup_steps=0.25)))  # 2 of 8
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps=2, and 4 is asked for"):
        check_same_run(replace(begun, optimizer=replace(begun.optimizer, warmup_steps=0.5)))
