"""Several students of one teacher at once, and a baseline beside them: each as it would be alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.on_policy import OnPolicyConfig, on_policy_steps
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.layers import Embedder
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training import inputs, trainer
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.loop import train, train_together
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.step import Taught
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid

SPEEDS = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def students(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """Four that differ in everything that students may differ in, and one of them has no teacher."""
    folder = tmp_path_factory.mktemp("together")
    teacher = write_teacher(
        toy_run, vivid(replace(toy_run.model, d_model=48, num_layers=4)), folder / "teacher"
    )
    first = replace(
        toy_run,
        name="first",
        output=str(folder / "first"),
        data=replace(toy_run.data, batch_size=8),
        mesh=MeshConfig(1, 4, 2),
        objective=ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher, "float32"),
        training=replace(toy_run.training, steps=5, eval_every=5),
        checkpoint=replace(toy_run.checkpoint, every=2, keep=1),
    )
    return [
        first,
        replace(
            first,
            name="second",
            output=str(folder / "second"),
            model=replace(first.model, num_layers=4, d_ff=32),
            objective=ObjectiveConfig(0.5, 0.0, temperature=2.0, block_tokens=30, jsd=0.5),
            distill=replace(first.distill, match=MatchConfig(((1, 0), (3, 3)), hidden=1.0)),
            optimizer=replace(first.optimizer, learning_rate=3e-3),
            seed=3,
        ),
        replace(
            first,
            name="third",
            output=str(folder / "third"),
            seed=4,
            distill=replace(
                first.distill,
                match=MatchConfig(((0, 2), (1, 3)), hidden=0.5, attention=2.0, distance="cosine"),
                on_policy=OnPolicyConfig(0.5, prompt_tokens=8),
            ),
            training=replace(first.training, accumulation=2),
        ),
        replace(
            first,
            name="text",
            output=str(folder / "text"),
            objective=ObjectiveConfig(1.0, 0.0, temperature=1.0, block_tokens=48),
            distill=DistillConfig(None, "bfloat16"),
        ),
    ]


@pytest.fixture(scope="module")
def together(students: list[RunConfig]) -> list[RunConfig]:
    train_together(students)
    return students


def rows(output: str | Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in SPEEDS} for row in read_metrics(output)
    ]


def written(output: str | Path) -> set[str]:
    return {path.name for path in Path(output).iterdir()}


def test_each_is_as_it_would_be_alone(together: list[RunConfig], tmp_path: Path) -> None:
    for config in together:
        alone = replace(config, output=str(tmp_path / config.name))
        train(alone)
        for found, expected in zip(rows(config.output), rows(alone.output), strict=True):
            split = expected.pop("split")
            assert found.pop("split") == split
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)
        assert written(config.output) == written(alone.output)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Taught]:
    """What a teacher read before the steps, one for each time."""
    found: list[Taught] = []
    read = inputs.Inputs.read

    def watched(self: inputs.Inputs, batch: Batch) -> Taught:
        taught = read(self, batch)
        if taught is not None:
            found.append(taught)
        return taught

    monkeypatch.setattr(inputs.Inputs, "read", watched)
    return found


def test_the_teacher_reads_each_batch_once(
    students: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[Taught]
) -> None:
    """And is in no student's step, which takes what it has said."""
    traced = []
    encode = Embedder.encode

    def watched(self: Embedder, tokens: jax.Array, dtype: Any) -> jax.Array:
        traced.append(self.d_model)
        return encode(self, tokens, dtype)

    monkeypatch.setattr(Embedder, "encode", watched)
    monkeypatch.setattr(trainer, "validate", lambda *_: {"cross_entropy": 0.0, "perplexity": 1.0})
    train_together([replace(config, output=str(tmp_path / config.name)) for config in students])
    third = students[2]
    assert third.distill.on_policy is not None
    own = on_policy_steps(third.distill.on_policy, third.seed, third.training.steps)
    assert sum(own) > 0
    assert len(readings) == third.training.steps + sum(own)
    assert traced.count(48) == 1
    assert traced.count(32) >= len(students)


@pytest.mark.thorough
def test_a_batch_that_nobody_takes_is_not_read(
    students: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[Taught]
) -> None:
    """Both train on their own samples alone."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: device)
    first = replace(
        students[0],
        output=str(tmp_path / "one"),
        mesh=MeshConfig(1, 1, 1),
        distill=replace(students[0].distill, on_policy=OnPolicyConfig(1.0, prompt_tokens=8)),
        training=replace(students[0].training, steps=2, eval_every=2),
    )
    train_together([first, replace(first, name="other", output=str(tmp_path / "other"))])
    assert len(readings) == 2 * 2


@pytest.mark.thorough
def test_one_whose_loss_breaks_lets_the_others_save(
    students: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = trainer.Trainer._log

    def broken(self: trainer.Trainer, rows: list[dict[str, jax.Array]], seconds: float) -> None:
        if self.config.name == "first" and self.step == 2:
            rows = [row | {"loss": jnp.float32("nan")} for row in rows]
        log(self, rows, seconds)

    monkeypatch.setattr(trainer.Trainer, "_log", broken)
    first, text = (replace(students[place], output=str(tmp_path / str(place))) for place in (0, 3))
    with pytest.raises(UserError) as error:
        train_together([first, text])
    assert "stopped before step 2: loss is nan; try a lower optimizer.learning_rate" in str(error.value)
    assert str(error.value).endswith("; without --student first, the same command goes on with the others.")
    assert [latest_step(config.output) for config in (first, text)] == [None, 2]


@pytest.mark.thorough
def test_a_stop_between_two_checkpoints(
    together: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first had saved step 4 and the others not, and of one nothing is left: it waits for them, and all end as
    without the stop."""
    cut = [replace(config, output=str(tmp_path / config.name)) for config in together]
    save = trainer.Trainer._save

    def save_and_die(self: trainer.Trainer) -> None:
        save(self)
        if self.config.name == "first" and self.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_together(cut)
    assert [latest_step(config.output) for config in cut] == [4, 2, 2, 2]
    shutil.rmtree(cut[1].output)
    train_together(cut)
    for config, whole in zip(cut, together, strict=True):
        assert rows(config.output) == rows(whole.output)
        chex.assert_trees_all_equal(load_model(config.output).params(), load_model(whole.output).params())


@pytest.mark.thorough
def test_one_that_is_done_is_left_alone(together: list[RunConfig], tmp_path: Path) -> None:
    new = replace(together[0], name="new", seed=9, output=str(tmp_path / "new"))
    before = rows(together[2].output)
    train_together([together[2], new])
    assert rows(together[2].output) == before
    assert latest_step(new.output) == 5


@pytest.mark.thorough
def test_a_baseline_alone_is_left(
    together: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loads the teacher for it."""

    def loaded(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(inputs, "load_teacher", loaded)
    left = replace(together[3], output=str(tmp_path / "left"))
    train_together([*together[:3], left])
    assert rows(left.output) == rows(together[3].output)


def test_runs_that_do_not_go_together(students: list[RunConfig]) -> None:
    first = students[0]
    other = replace(first, name="other", output=f"{first.output}-other")
    with pytest.raises(
        UserError, match=r"first has data.seed=0, and other has 1; runs that are trained together"
    ):
        train_together([first, replace(other, data=replace(first.data, seed=1))])
    with pytest.raises(UserError, match=r"first has training.steps=5, and other has 6"):
        train_together([first, replace(other, training=replace(first.training, steps=6))])
    every_second = replace(first.training, log_every=2, eval_every=2)
    with pytest.raises(UserError, match=r"first has training.log_every=1, and other has 2"):
        train_together([first, replace(other, training=every_second)])
    padded = replace(first.model, vocab_size=416, vocab_padding=16)
    with pytest.raises(UserError, match=r"first has model.vocab_size=400, and other has 416"):
        train_together([first, replace(other, model=padded)])
    cached = replace(first.distill, cache="runs/cache")
    warm = replace(other, objective=replace(first.objective, temperature=2.0), distill=cached)
    with pytest.raises(UserError, match=r"first has objective.temperature=1.0, and other has 2.0"):
        train_together([replace(first, distill=cached), warm])
    with pytest.raises(UserError, match=r"first has distill.dtype=float32, and other has bfloat16"):
        train_together([first, students[3], replace(other, distill=replace(first.distill, dtype="bfloat16"))])
    with pytest.raises(UserError, match=r"text has data.seed=0, and other has 1"):
        train_together([students[3], replace(other, data=replace(first.data, seed=1))])
    with pytest.raises(UserError, match=r"for two runs; each needs a folder of its own"):
        train_together([first, replace(other, output=first.output)])


def test_one_that_is_refused_leaves_nothing_of_the_others(students: list[RunConfig], tmp_path: Path) -> None:
    """Found when the second is built, after the first stands."""
    good, bad = (
        replace(student, output=str(tmp_path / "family" / student.name))
        for student in (students[0], students[2])
    )
    bad = replace(bad, initialise=InitConfig(source=str(tmp_path / "nobody")))
    with pytest.raises(UserError, match="nobody does not exist"):
        train_together([good, bad])
    assert not any(tmp_path.iterdir())


def test_what_any_of_them_is_to_match_has_to_be_there(students: list[RunConfig], tmp_path: Path) -> None:
    """It is the last that asks for too much; the first loads the teacher."""

    def refused(match: MatchConfig, **sizes: int) -> str:
        first, other = (
            replace(config, output=str(tmp_path / config.name)) for config in (students[0], students[2])
        )
        distill = replace(other.distill, match=match)
        with pytest.raises(UserError) as error:
            train_together([first, replace(other, model=replace(other.model, **sizes), distill=distill)])
        assert not any(tmp_path.iterdir())
        return str(error.value)

    assert refused(MatchConfig(((1, 5),), hidden=1.0)) == (
        "distill.match.layers names the teacher's layer 5, and the teacher has 4; layers are counted from 0 to 3."
    )
    assert "(model.sliding_window) is 16 and the teacher's 8" in refused(
        MatchConfig(((0, 0),), attention=1.0), sliding_window=16
    )
