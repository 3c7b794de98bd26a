"""Distillation from a cache gives the same student as from the online teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.start import with_prepared_vocabulary
from gemma2_jax.training.teacher_cache import write_cache
from gemma2_jax.training.together import train_together
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.training.stops import stopped_after

FULL = EncodingConfig("full", None, weight_bits=16)


@pytest.fixture(scope="module")
def online(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A student distilled from the online teacher."""
    folder = tmp_path_factory.mktemp("cached")
    teacher = write_teacher(toy_run, vivid(replace(toy_run.model, d_model=48)), folder / "teacher")
    return replace(
        toy_run,
        objective=ObjectiveConfig(0.2, 0.8, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher, "float32"),
        mesh=MeshConfig(1, 4, 2),
        output=str(folder / "online"),
    )


def cached(online: RunConfig, encoding: EncodingConfig, name: str) -> RunConfig:
    """The same student with a written cache in place of the teacher."""
    folder = Path(online.output).parent
    distill = replace(online.distill, cache=str(folder / f"cache-{name}"), encoding=encoding)
    config = replace(online, distill=distill, output=str(folder / name))
    write_cache(with_prepared_vocabulary(config))
    return config


def losses(config: RunConfig) -> list[float]:
    return [row["kl"] for row in read_metrics(config.output) if row["split"] == "train"]


@pytest.fixture(scope="module")
def full(online: RunConfig) -> RunConfig:
    config = cached(online, FULL, "full")
    train(config)
    return config


@pytest.mark.thorough
def test_the_whole_distribution_trains_as_the_teacher_itself(online: RunConfig, full: RunConfig) -> None:
    train(online)
    # Logarithms are kept in steps of (2 * 30 + log 400) / 65535 = 1e-3; a KL of size 1 is off by as much at most.
    assert losses(full) == pytest.approx(losses(online), abs=1e-3)
    for one, two in zip(
        *(jax.tree.leaves(load_model(run.output).params()) for run in (online, full)), strict=True
    ):
        assert abs(one - two).max() < 2e-2 * abs(one).max()


@pytest.mark.thorough
def test_validations_use_the_teacher_itself(online: RunConfig, full: RunConfig) -> None:
    """Validations load the teacher, since a cache does not cover their documents."""
    train(online)  # if no test before has
    by_cache, by_teacher = (
        next(row for row in read_metrics(run.output) if row["split"] == "validation")
        for run in (full, online)
    )
    for name in ("kl", "agreement", "acceptance", "entropy", "teacher_entropy"):
        assert by_cache[name] == pytest.approx(by_teacher[name], rel=0.05)


@pytest.mark.thorough
def test_a_run_from_a_cache_goes_on_where_it_was(full: RunConfig, tmp_path: Path) -> None:
    cut = replace(full, output=str(tmp_path))
    with stopped_after(5):
        train(cut)
    assert latest_step(cut.output) == 3
    train(cut)
    assert losses(cut) == losses(full)
    chex.assert_trees_all_equal(load_model(cut.output).params(), load_model(full.output).params())


@pytest.fixture
def begun(full: RunConfig, tmp_path: Path) -> RunConfig:
    """A stopped run with a cache of its own, which it uses unchanged."""
    cache = shutil.copytree(str(full.distill.cache), tmp_path / "cache")
    distill = replace(full.distill, cache=str(cache), encoding=None)
    config = replace(full, output=str(tmp_path / "run"), distill=distill)
    with stopped_after(5):
        train(config)
    return config


@pytest.mark.thorough
def test_a_run_goes_on_where_its_cache_was_moved_to(
    begun: RunConfig, full: RunConfig, tmp_path: Path
) -> None:
    shutil.move(str(begun.distill.cache), tmp_path / "moved")
    train(replace(begun, distill=replace(begun.distill, cache=str(tmp_path / "moved"))))
    assert losses(begun) == losses(full)


@pytest.mark.thorough
def test_a_cache_that_was_made_anew_is_not_the_runs(
    begun: RunConfig, full: RunConfig, online: RunConfig
) -> None:
    other = cached(online, replace(FULL, weight_bits=12), "coarse").distill.cache
    kept = Path(begun.output, "teacher.json")
    shutil.rmtree(str(begun.distill.cache))
    shutil.copytree(str(other), str(begun.distill.cache))
    with pytest.raises(
        UserError,
        match=r"was distilled from a cache with distill\.encoding\.weight_bits=16 .*, but .* has 12",
    ):
        train(begun)
    # Older records do not name the cache: the teacher is the same, so the cache must be in its old folder.
    kept.write_text(json.dumps({"identity": json.loads(kept.read_text())["identity"]}))
    with pytest.raises(UserError, match=r"holds a run with distill\.cache="):
        train(replace(begun, distill=replace(begun.distill, cache=other)))
    train(begun)
    assert latest_step(begun.output) == 8


@pytest.mark.thorough
def test_on_another_mesh(full: RunConfig, tmp_path: Path) -> None:
    other = replace(full, mesh=MeshConfig(2, 2, 2), output=str(tmp_path))
    train(other)
    assert losses(other) == pytest.approx(losses(full), rel=1e-4)


@pytest.mark.thorough
def test_without_the_teacher_any_cache_will_do(full: RunConfig, tmp_path: Path) -> None:
    distill = DistillConfig(None, "float32", cache=full.distill.cache)
    train(replace(full, distill=distill, output=str(tmp_path)))
    rows = read_metrics(tmp_path)
    assert [row["kl"] for row in rows if row["split"] == "train"] == losses(full)
    assert "kl" not in next(row for row in rows if row["split"] == "validation")


@pytest.mark.thorough
def test_a_cache_that_does_not_fit_is_refused_before_anything_is_written(
    full: RunConfig, tmp_path: Path
) -> None:
    warm = replace(
        full,
        objective=replace(full.objective, temperature=2.0),
        distill=replace(full.distill, encoding=None),
        output=str(tmp_path / "warm"),
    )
    with pytest.raises(UserError, match=r"was made at temperature 1.0, but objective.temperature is 2.0"):
        train(warm)
    longer = replace(full.training, steps=9, eval_every=9)
    with pytest.raises(
        UserError, match=r"holds 32 rows, but training.steps \(9\) times data.batch_size \(4\)"
    ):
        train(replace(full, training=longer, output=str(tmp_path / "longer")))
    half = replace(full.distill, dtype="bfloat16")
    with pytest.raises(UserError, match=r"a different distill\.dtype \(float32, now bfloat16\)"):
        train(replace(full, distill=half, output=str(tmp_path / "half")))
    assert not (tmp_path / "warm" / "config.yaml").exists()


@pytest.mark.thorough
def test_several_students_of_one_cache(full: RunConfig, tmp_path: Path) -> None:
    both = [
        replace(full, output=str(tmp_path / "same")),
        replace(full, name="other", seed=5, output=str(tmp_path / "other")),
    ]
    train_together(both)
    assert losses(both[0]) == pytest.approx(losses(full), rel=2e-5)
    alone = replace(both[1], output=str(tmp_path / "alone"))
    train(alone)
    assert losses(both[1]) == pytest.approx(losses(alone), rel=2e-5)


@pytest.mark.thorough
def test_a_baseline_trained_with_a_student_of_a_cache(full: RunConfig, tmp_path: Path) -> None:
    """They train together until a stop; then each resumes alone, one without the cache and one with it."""
    objective = ObjectiveConfig(1.0, 0.0, temperature=1.0, block_tokens=48)
    text = replace(full, name="text", objective=objective, distill=DistillConfig(None, "float32"))
    warm = replace(
        full, objective=replace(full.objective, temperature=2.0), distill=replace(full.distill, encoding=None)
    )
    with pytest.raises(
        UserError, match=r"toy has objective.temperature=1.0, but warm has objective.temperature=2.0"
    ):
        train_together([text, replace(full, distill=warm.distill), replace(warm, name="warm")])
    whole = replace(text, output=str(tmp_path / "whole"))
    train(whole)
    both = [replace(text, output=str(tmp_path / "text")), replace(full, output=str(tmp_path / "same"))]
    with stopped_after(5):
        train_together(both)
    assert [latest_step(config.output) for config in both] == [3, 3]
    for config, expected in zip(both, (whole, full), strict=True):
        train(config)
        trees = [load_model(each.output).params() for each in (config, expected)]
        chex.assert_trees_all_close(*trees, atol=1e-3)  # but for rounding in Adam steps of 1e-2
        found, alone = (
            [row["cross_entropy"] for row in read_metrics(each.output)] for each in (config, expected)
        )
        assert found == pytest.approx(alone, rel=2e-5)
