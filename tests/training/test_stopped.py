"""A run stopped by a signal saves its current step and resumes with identical results."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import pytest

from gemma2_jax import stops
from gemma2_jax.checkpoints.store import CheckpointConfig, CheckpointStore, latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.training import teacher_cache as writer
from gemma2_jax.training import trainer
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.start import with_prepared_vocabulary
from gemma2_jax.training.teacher_cache import write_cache
from gemma2_jax.training.together import train_together
from gemma2_jax.training.trainer import Trainer
from tests.distill.test_cache import content, write_teacher

pytestmark = pytest.mark.usefixtures("one_device")

TIMES = ("tokens_per_second", "seconds", "mfu")


@pytest.fixture(scope="module")
def whole(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that is never stopped, with metrics over several steps and rare checkpoints."""
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("stopped") / "whole"),
        training=replace(toy_run.training, steps=9, log_every=3, eval_every=3),
        checkpoint=CheckpointConfig(every=6, keep=2),
    )
    train(config)
    return config


@contextmanager
def signal_at(step: int, owner: Any = Trainer, name: str = "_take_step") -> Iterator[None]:
    """Sends SIGTERM when a run at `step` starts some work; the block ends by the signal."""
    function = getattr(owner, name)

    def interrupted(self: Any, *arguments: Any) -> Any:
        if not isinstance(self, Trainer) or self._step == step:
            signal.raise_signal(signal.SIGTERM)
        return function(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with stops.handled(), pytest.raises(stops.Stopped) as caught:
            yield
    assert caught.value.number == signal.SIGTERM
    stop.append(caught.value)


stop: list[stops.Stopped] = []  # how the last one ended


def promise() -> str:
    return stops.message(stop.pop()).strip()


def rows(folder: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(folder)]


def assert_same(config: RunConfig, whole: RunConfig) -> None:
    assert rows(config.output) == rows(whole.output)
    chex.assert_trees_all_equal(load_model(config.output).params(), load_model(whole.output).params())


@pytest.mark.parametrize("step", [4, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_it_saves_its_step_and_goes_on(whole: RunConfig, tmp_path: Path, step: int) -> None:
    """The checkpoint holds metrics that are not reported yet, so averages equal those of an uninterrupted run."""
    config = replace(whole, output=str(tmp_path / "run"))
    with signal_at(step):
        train(config)
    assert latest_step(config.output) == step + 1
    assert promise() == f"gemma2: stopped; the same command resumes from step {step + 1} of {config.output}."
    assert all(row["step"] <= step for row in rows(config.output))
    train(config)
    assert_same(config, whole)


@pytest.mark.slow
def test_stopped_at_every_step(whole: RunConfig, tmp_path: Path) -> None:
    """Extra checkpoints count like others, and the speed in a row covers all of its steps."""
    config = replace(whole, output=str(tmp_path / "run"))
    for step in range(whole.training.steps):
        with signal_at(step):
            train(config)
        kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert kept == [number for number in (step, step + 1) if number]
    train(config)
    assert_same(config, whole)
    assert all(row["tokens_per_second"] > 0 for row in read_metrics(config.output) if row["split"] == "train")


# Where no checkpoint is due, and where one is.
@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.thorough), pytest.param(6, marks=pytest.mark.slow)]
)
def test_an_evaluation_that_is_cut_short_is_done_later(whole: RunConfig, tmp_path: Path, step: int) -> None:
    config = replace(whole, output=str(tmp_path / "run"))
    with signal_at(step, Trainer, "_evaluate_if_due"):
        train(config)
    assert latest_step(config.output) == step
    assert [row["split"] for row in rows(config.output) if row["step"] == step] == ["train"]
    with signal_at(step, Trainer, "_evaluate_if_due"):  # and again
        train(config)
    assert latest_step(config.output) == step
    with pytest.MonkeyPatch.context() as patch:  # killed when it is done, before anything is saved
        patch.setattr(Trainer, "_take_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert rows(config.output)[-1]["split"] == "validation"
    train(config)
    assert_same(config, whole)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.thorough
def test_the_last_evaluation_is_not_cut_short(whole: RunConfig, tmp_path: Path) -> None:
    """No run is resumed after it."""
    config = replace(whole, output=str(tmp_path / "run"))
    with signal_at(9, Trainer, "_evaluate_if_due"):
        train(config)
    assert latest_step(config.output) == 9
    assert_same(config, whole)


@pytest.mark.thorough
def test_a_signal_while_a_checkpoint_is_written(whole: RunConfig, tmp_path: Path) -> None:
    config = replace(whole, output=str(tmp_path / "run"))
    with signal_at(6, CheckpointStore, "save"):
        train(config)
    assert latest_step(config.output) == 6
    assert promise() == f"gemma2: stopped; the same command resumes from step 6 of {config.output}."
    train(config)
    assert_same(config, whole)


def test_before_the_first_step_nothing_is_saved(whole: RunConfig, tmp_path: Path) -> None:
    config = replace(whole, output=str(tmp_path / "run"))
    with signal_at(0, trainer, "build_train_step"):
        train(config)
    assert promise() == "gemma2: stopped; no step is saved yet; the same command starts from the beginning."
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_broken_weights_are_not_saved(
    whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(whole, output=str(tmp_path / "run"))
    step = Trainer._take_step

    def broken(self: Trainer, *fed: Any) -> None:
        step(self, *fed)
        if self._step == 7:
            self._rows[-1] = dict(self._rows[-1]) | {"loss": float("nan")}
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_take_step", broken)
    with stops.handled(), pytest.raises(UserError, match=r"stopped before step 7 because loss is nan"):
        train(config)
    assert latest_step(config.output) == 6


@pytest.mark.thorough
def test_runs_that_are_trained_together(whole: RunConfig, tmp_path: Path) -> None:
    """One of the runs was ahead."""
    teacher = write_teacher(whole, Gemma2.init(whole.model, jax.random.key(1)), tmp_path / "teacher")
    objective = ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48)
    student = replace(whole, distill=DistillConfig(teacher, "float32"), objective=objective)
    configs = [
        replace(student, name=name, seed=seed, output=str(tmp_path / name))
        for seed, name in enumerate(("one", "other"))
    ]
    with signal_at(3):
        train(configs[1])
    with signal_at(1):
        train_together(configs)
    assert [latest_step(config.output) for config in configs] == [2, 4]
    one, other = (config.output for config in configs)
    assert (
        promise() == f"gemma2: stopped; the same command resumes from step 2 of {one} and step 4 of {other}."
    )
    with signal_at(6):
        train_together(configs)
    assert [latest_step(config.output) for config in configs] == [7, 7]
    train_together(configs)
    alone = replace(configs[0], output=str(tmp_path / "alone"))
    train(alone)
    # In several programs, of one run and of two: equal but for rounding.
    for found, expected in zip(rows(one), rows(alone.output), strict=True):
        assert found.pop("split") == expected.pop("split")
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)


@pytest.mark.thorough
def test_runs_without_a_teacher_go_one_after_the_other(whole: RunConfig, tmp_path: Path) -> None:
    configs = [
        replace(whole, name=name, seed=seed, output=str(tmp_path / name))
        for seed, name in enumerate(("one", "other"))
    ]
    with signal_at(6):
        train_together(configs)
    assert [latest_step(config.output) for config in configs] == [7, None]
    assert promise() == f"gemma2: stopped; the same command resumes from step 7 of {configs[0].output}."
    train_together(configs)
    assert_same(configs[0], whole)
    assert latest_step(configs[1].output) == 9


@pytest.mark.thorough
def test_a_cache_keeps_the_step_it_is_at(
    whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_teacher(whole, Gemma2.init(whole.model, jax.random.key(1)), tmp_path / "teacher")
    distill = DistillConfig(teacher, "float32", cache=str(tmp_path / "cache"), encoding=EncodingConfig())
    objective = ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48)
    task, cache = (
        with_prepared_vocabulary(replace(whole, distill=distill, objective=objective)),
        str(tmp_path / "cache"),
    )
    write: Callable[..., None] = writer.RecordWriter.write
    written = []

    def interrupted(self: writer.RecordWriter, record: bytes) -> None:
        written.append(record)
        if len(written) == 4 * 5 + 2:  # in the middle of the sixth step
            signal.raise_signal(signal.SIGTERM)
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(writer.RecordWriter, "write", interrupted)
        with stops.handled(), pytest.raises(stops.Stopped) as caught:
            write_cache(task)
    assert read_cache(cache).rows == 4 * 6
    assert stops.message(caught.value).strip() == (
        f"gemma2: stopped; 24 rows of {cache} are written; the same command resumes after them."
    )
    write_cache(task)
    assert read_cache(cache).rows == 4 * 9
    again = str(tmp_path / "again")
    write_cache(replace(task, distill=replace(distill, cache=again)))
    assert records(cache) == records(again)


def records(folder: str) -> list[bytes]:
    import grain

    files = [str(Path(folder) / name) for name in sorted(content(folder)) if name.endswith(".arrayrecord")]
    return list(grain.sources.ArrayRecordDataSource(files))
