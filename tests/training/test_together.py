"""Several students of one teacher and a baseline trained together: each equals the same run alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods import distillation
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.method import frozen_in_step
from gemma2_jax.methods.students import Students
from gemma2_jax.model.layers import Embedder
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training import together as module
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.run_folder import Rows, RunFolder
from gemma2_jax.training.state import Update
from gemma2_jax.training.step import build_train_step
from gemma2_jax.training.together import Updates, train_together
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid

SPEEDS = ("tokens_per_second", "seconds", "mfu")


@pytest.fixture(scope="module")
def students(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """Four students that differ in everything that may differ; one of them has no teacher."""
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
        training=replace(toy_run.training, steps=5, eval_every=5, accumulation=2),
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
            ),
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


def assert_same_but_for_rounding(output: str | Path, other: str | Path) -> None:
    for found, expected in zip(rows(output), rows(other), strict=True):
        split = expected.pop("split")
        assert found.pop("split") == split
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)
    trees = [jax.tree.leaves(load_model(folder).params()) for folder in (output, other)]
    for one, two in zip(*trees, strict=True):
        np.testing.assert_allclose(one, two, atol=5e-4)  # a few Adam steps of 1e-2 at most


@pytest.mark.thorough
def test_each_is_as_it_would_be_alone(together: list[RunConfig], tmp_path: Path) -> None:
    for config in together:
        alone = replace(config, output=str(tmp_path / config.name))
        train(alone)
        assert_same_but_for_rounding(config.output, alone.output)
        assert written(config.output) == written(alone.output)


@pytest.mark.parametrize("names", [("first", "second", "third", "text"), ("text", "third", "first")])
@pytest.mark.thorough
def test_the_teacher_is_in_the_step_once(
    students: list[RunConfig], monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """The teacher runs once for all students, whichever of its layers and logits each one uses."""
    traced = []
    encode = Embedder.encode

    def watched(self: Embedder, tokens: jax.Array, dtype: Any) -> jax.Array:
        traced.append(self.d_model)
        return encode(self, tokens, dtype)

    monkeypatch.setattr(Embedder, "encode", watched)
    configs = {config.name: config for config in students}
    method = Students({name: build_method(configs[name]) for name in names})
    updates = {name: Update(configs[name], method.specs[name]) for name in names}
    mesh, layout = build_mesh(students[0].mesh), students[0].layout
    with jax.set_mesh(mesh), laid_out(layout):
        states = {name: update.abstract_state(mesh) for name, update in updates.items()}
        step = build_train_step(method, Updates(updates), states, layout)
        frozen = frozen_in_step(method, method.abstract_frozen(mesh))
        lowered = step.lower(states, frozen, method.abstract_batch(mesh))
    assert sorted(traced) == [32] * len(names) + [48]
    _, metrics = lowered.out_info
    assert set(metrics) == set(names)
    assert {"kl", "match_hidden"}.isdisjoint(metrics["text"])
    assert {"match_hidden", "match_attention"} <= set(metrics["third"])


@pytest.mark.thorough
def test_one_whose_loss_breaks_lets_the_others_save(
    students: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunFolder.log

    def broken(self: RunFolder, step: int, rows: Rows, seconds: float) -> None:
        if self.config.name == "first" and step == 2:
            rows = [{**row, "loss": jnp.float32("nan")} for row in rows]
        log(self, step, rows, seconds)

    monkeypatch.setattr(RunFolder, "log", broken)
    first, text = (replace(students[place], output=str(tmp_path / str(place))) for place in (0, 3))
    with pytest.raises(UserError) as error:
        train_together([first, text])
    assert "stopped before step 2 because loss is nan; try a lower optimizer.learning_rate" in str(
        error.value
    )
    assert str(error.value).endswith("; the same command without --student first resumes the other runs.")
    assert [latest_step(config.output) for config in (first, text)] == [None, 2]


@pytest.mark.thorough
def test_a_stop_between_two_checkpoints(
    together: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first had saved step 4 and the others not, and of one nothing is left. Those behind are trained up to the
    others, and all end as without the stop."""
    first, second, _, text = together
    cut = [replace(config, output=str(tmp_path / config.name)) for config in (first, second, text)]
    save = RunFolder.save_if_due

    def save_and_die(self: RunFolder, step: int, state: Any, examples: Any) -> None:
        save(self, step, state, examples)
        if self.config.name == "first" and step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_if_due", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_together(cut)
    assert [latest_step(config.output) for config in cut] == [4, 2, 2]
    shutil.rmtree(cut[1].output)
    stretches = []
    train_method = module.train_method

    def watched(method: Any, configs: list[RunConfig], folder: Any, until: int) -> None:
        stretches.append(({config.name for config in configs}, until))
        train_method(method, configs, folder, until)

    monkeypatch.setattr(module, "train_method", watched)
    train_together(cut)
    assert stretches == [
        ({"second"}, 2),
        ({"second", "text"}, 4),
        ({"first", "second", "text"}, 5),
    ]
    for config, whole in zip(cut, (first, second, text), strict=True):
        assert_same_but_for_rounding(config.output, whole.output)


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
    """The baseline trains without loading the teacher."""

    def loaded(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(distillation, "load_teacher", loaded)
    left = replace(together[3], output=str(tmp_path / "left"))
    train_together([*together[:3], left])
    assert_same_but_for_rounding(left.output, together[3].output)


def test_runs_that_do_not_go_together(students: list[RunConfig]) -> None:
    first = students[0]
    other = replace(first, name="other", output=f"{first.output}-other")
    with pytest.raises(
        UserError, match=r"first has data.seed=0, but other has data.seed=1; runs that are trained together"
    ):
        train_together([first, replace(other, data=replace(first.data, seed=1))])
    with pytest.raises(UserError, match=r"first has training.steps=5, but other has training.steps=6"):
        train_together([first, replace(other, training=replace(first.training, steps=6))])
    every_second = replace(first.training, log_every=2, eval_every=2)
    with pytest.raises(
        UserError, match=r"first has training.log_every=1, but other has training.log_every=2"
    ):
        train_together([first, replace(other, training=every_second)])
    changed: list[tuple[str, Any]] = [("accumulation", 4), ("eval_batches", 3)]
    for key, value in changed:
        with pytest.raises(
            UserError, match=rf"first has training.{key}=(2|null), but other has training.{key}={value}"
        ):
            train_together([first, replace(other, training=replace(first.training, **{key: value}))])
    padded = replace(first.model, vocab_size=416, vocab_padding=16)
    with pytest.raises(
        UserError, match=r"first has model.vocab_size=400, but other has model.vocab_size=416"
    ):
        train_together([first, replace(other, model=padded)])
    cached = replace(first.distill, cache="runs/cache")
    warm = replace(other, objective=replace(first.objective, temperature=2.0), distill=cached)
    with pytest.raises(
        UserError, match=r"first has objective.temperature=1.0, but other has objective.temperature=2.0"
    ):
        train_together([replace(first, distill=cached), warm])
    with pytest.raises(
        UserError, match=r"first has distill.dtype=float32, but other has distill.dtype=bfloat16"
    ):
        train_together([first, students[3], replace(other, distill=replace(first.distill, dtype="bfloat16"))])
    with pytest.raises(UserError, match=r"text has data.seed=0, but other has data.seed=1"):
        train_together([students[3], replace(other, data=replace(first.data, seed=1))])
    with pytest.raises(UserError, match=r"for two runs; each run needs its own folder"):
        train_together([first, replace(other, output=first.output)])


def test_one_that_samples_for_itself_is_refused(students: list[RunConfig], tmp_path: Path) -> None:
    first, other = (replace(students[0], name=name, output=str(tmp_path / name)) for name in ("one", "other"))
    sampling = replace(first.distill, on_policy=OnPolicyConfig(0.5, prompt_tokens=8))
    with pytest.raises(UserError) as error:
        train_together([first, replace(other, distill=sampling)])
    assert str(error.value) == (
        "other sets distill.on_policy, so it samples its own batches and cannot share the teacher's forward pass; "
        "train it on its own with `gemma2 train`."
    )
    assert not any(tmp_path.iterdir())


def test_one_that_is_refused_leaves_nothing_of_the_others(students: list[RunConfig], tmp_path: Path) -> None:
    """The error occurs when the second student is built, after the first."""
    good, bad = (
        replace(student, output=str(tmp_path / "family" / student.name))
        for student in (students[0], students[2])
    )
    bad = replace(bad, initialise=InitConfig(source=str(tmp_path / "nobody")))
    with pytest.raises(UserError, match="nobody does not exist"):
        train_together([good, bad])
    assert not any(tmp_path.iterdir())


def test_what_any_of_them_is_to_match_has_to_be_there(students: list[RunConfig], tmp_path: Path) -> None:
    """The last student has the impossible setting; the first one loads the teacher."""

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
        "distill.match.layers names the teacher's layer 5, but the teacher has 4 layers, counted from 0 to 3."
    )
    assert "the student's layer 0 has a window of 16 and the teacher's layer 0 has a window of 8" in refused(
        MatchConfig(((0, 0),), attention=1.0), sliding_window=16
    )
