"""Several students of one teacher at once: each as it would be alone."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training import trainer
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.loop import train, train_together
from gemma2_jax.training.metrics import read_metrics
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid

SPEEDS = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def students(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """Three that differ in everything that students may differ in."""
    folder = tmp_path_factory.mktemp("together")
    teacher = write_teacher(toy_run, vivid(replace(toy_run.model, d_model=48)), folder / "teacher")
    first = replace(
        toy_run,
        name="first",
        output=str(folder / "first"),
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
            optimizer=replace(first.optimizer, learning_rate=3e-3),
            seed=3,
        ),
        replace(first, name="third", output=str(folder / "third"), seed=4),
    ]


@pytest.fixture(scope="module")
def together(students: list[RunConfig]) -> list[RunConfig]:
    train_together(students)
    return students


def rows(output: str | Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in SPEEDS} for row in read_metrics(output)
    ]


def test_each_is_as_it_would_be_alone(together: list[RunConfig], tmp_path: Path) -> None:
    for config in together:
        alone = replace(config, output=str(tmp_path / config.name))
        train(alone)
        for found, expected in zip(rows(config.output), rows(alone.output), strict=True):
            split = expected.pop("split")
            assert found.pop("split") == split
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_the_teacher_reads_each_batch_once(
    students: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the steps are compiled, the teacher is never traced: what they take is what it has said."""
    traced = []
    hidden = Gemma2.hidden

    def watched(self: Gemma2, *arguments: object) -> jax.Array:
        traced.append(self.config.d_model)
        return hidden(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Gemma2, "hidden", watched)
    monkeypatch.setattr(trainer, "validate", lambda *_: {"cross_entropy": 0.0, "perplexity": 1.0})
    train_together([replace(config, output=str(tmp_path / config.name)) for config in students])
    assert traced.count(48) == 1
    assert traced.count(32) == 3


def test_a_stop_between_two_checkpoints(
    together: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first had saved step 4 and the others not: it waits for them, and all end as without the stop."""
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
    assert [latest_step(config.output) for config in cut] == [4, 2, 2]
    train_together(cut)
    for config, whole in zip(cut, together, strict=True):
        assert rows(config.output) == rows(whole.output)
        chex.assert_trees_all_equal(load_model(config.output).params(), load_model(whole.output).params())


def test_one_that_is_done_is_left_alone(together: list[RunConfig], tmp_path: Path) -> None:
    new = replace(together[0], name="new", seed=9, output=str(tmp_path / "new"))
    before = rows(together[2].output)
    train_together([together[2], new])
    assert rows(together[2].output) == before
    assert latest_step(new.output) == 5


def test_runs_that_do_not_go_together(students: list[RunConfig]) -> None:
    first = students[0]
    other = replace(first, name="other", output=f"{first.output}-other")
    with pytest.raises(
        UserError, match=r"first has data.seed=0, and other has 1; runs that are trained together"
    ):
        train_together([first, replace(other, data=replace(first.data, seed=1))])
    with pytest.raises(UserError, match=r"first has training.steps=5, and other has 6"):
        train_together([first, replace(other, training=replace(first.training, steps=6))])
    padded = replace(first.model, vocab_size=416, vocab_padding=16)
    with pytest.raises(UserError, match=r"first has model.vocab_size=400, and other has 416"):
        train_together([first, replace(other, model=padded)])
    cached = replace(first.distill, cache="runs/cache")
    warm = replace(other, objective=replace(first.objective, temperature=2.0), distill=cached)
    with pytest.raises(UserError, match=r"first has objective.temperature=1.0, and other has 2.0"):
        train_together([replace(first, distill=cached), warm])
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


def test_matching_takes_a_teacher_in_each_step(students: list[RunConfig]) -> None:
    distill = replace(students[0].distill, match=MatchConfig(((0, 0),), hidden=1.0))
    with pytest.raises(
        UserError, match=r"distill\.match is set, which takes a teacher within each run's own step"
    ):
        train_together([replace(student, distill=distill) for student in students])
