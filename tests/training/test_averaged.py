"""The average of the weights over the steps: its value, its place in checkpoints, and what can be done with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.formats.merge import merge
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.config import TrainingConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.resume import check_same_run
from gemma2_jax.training.together import train_together
from tests.distill.test_cache import write_teacher
from tests.training.stops import stopped_after

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.thorough]

KL = ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48)


def averaging(run: RunConfig, ema: float | None = 0.75, **training: Any) -> RunConfig:
    return replace(run, training=replace(run.training, ema=ema, **training))


def averages_of(run: RunConfig) -> Any:
    """The averaged weights in a run's newest checkpoint."""
    target = abstract_params(weight_specs(run.model), mesh=build_mesh(run.mesh))
    return store.restore_params(run.output, target, store.AVERAGED)


@pytest.fixture(scope="module")
def finished(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was never interrupted."""
    run = averaging(replace(toy_run, output=str(tmp_path_factory.mktemp("averaged") / "whole")), steps=4)
    train(run)
    return run


def test_a_run_is_validated_with_both_weights(finished: RunConfig) -> None:
    last = read_metrics(finished.output)[-1]
    weights, averaged = evaluate_run(finished.output), evaluate_run(finished.output, averaged=True)
    for name in ("cross_entropy", "perplexity", "entropy"):
        assert last[name] == pytest.approx(getattr(weights, name), rel=1e-6)
        assert last[f"averaged_{name}"] == pytest.approx(getattr(averaged, name), rel=1e-6)
    assert last["cross_entropy"] < last["averaged_cross_entropy"] - 0.01  # early on, the average lags
    assert "averaged_targets" not in last


def test_a_resumed_average_is_bit_identical(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, output=str(tmp_path / "cut"))
    with stopped_after(2):
        train(run)
    train(run)
    chex.assert_trees_all_equal(averages_of(run), averages_of(finished))
    times = ("tokens_per_second", "seconds", "mfu")
    one, other = (
        [
            {name: value for name, value in row.items() if name not in times}
            for row in read_metrics(each.output)
        ]
        for each in (run, finished)
    )
    assert one == other


def test_the_average_is_exported(finished: RunConfig, tmp_path: Path) -> None:
    convert(finished.output, tmp_path / "exported", averaged=True)
    model, _ = load(tmp_path / "exported")
    chex.assert_trees_all_equal(model.params(), averages_of(finished))
    chex.assert_trees_all_equal(load(finished.output, averaged=True)[0].params(), model.params())
    weights = load(finished.output)[0].params()
    assert not np.array_equal(weights["embedder"]["embedding"], model.params()["embedder"]["embedding"])


def test_averages_are_merged(finished: RunConfig, tmp_path: Path) -> None:
    merge([finished.output] * 2, tmp_path / "merged", "linear", averaged=True)
    chex.assert_trees_all_close(load(tmp_path / "merged")[0].params(), averages_of(finished), rtol=1e-6)


def test_a_run_keeps_its_decay(finished: RunConfig) -> None:
    check_same_run(finished)
    with pytest.raises(
        UserError, match=r"holds a run with training\.ema=0\.75, but training\.ema is now 0\.5;"
    ):
        check_same_run(averaging(finished, 0.5))
    with pytest.raises(UserError, match=r"write training\.ema=0\.75 to resume it"):
        check_same_run(averaging(finished, None))


@pytest.mark.parametrize("kind", ["matched", pytest.param("on-policy", marks=pytest.mark.thorough)])
def test_the_average_of_a_student(kind: str, toy_run: RunConfig, tmp_path: Path) -> None:
    """Its other trained trees are averaged and resumed too."""
    teacher = write_teacher(toy_run, Gemma2.init(toy_run.model, jax.random.key(1)), tmp_path / "teacher")
    distill = DistillConfig(teacher, "float32")
    if kind == "matched":
        distill = replace(distill, match=MatchConfig(((0, 0), (1, 1)), hidden=1.0))
    else:
        distill = replace(distill, on_policy=OnPolicyConfig(fraction=0.5, prompt_tokens=8))
    run = replace(toy_run, output=str(tmp_path / "run"), objective=KL, distill=distill)
    run = averaging(run, steps=2, eval_every=2)
    with stopped_after(1):
        train(run)
    train(run)
    last = read_metrics(run.output)[-1]
    assert last["averaged_kl"] == pytest.approx(evaluate_run(run.output, teacher, averaged=True).kl, rel=1e-5)


@pytest.mark.thorough
def test_only_some_of_several_students_have_an_average(toy_run: RunConfig, tmp_path: Path) -> None:
    teacher = write_teacher(toy_run, Gemma2.init(toy_run.model, jax.random.key(1)), tmp_path / "teacher")
    plain = replace(
        toy_run,
        name="plain",
        output=str(tmp_path / "plain"),
        objective=KL,
        distill=DistillConfig(teacher, "float32"),
        training=replace(toy_run.training, steps=2, eval_every=2),
    )
    averaged = averaging(replace(plain, name="averaged", output=str(tmp_path / "averaged")))
    train_together([plain, averaged])
    with pytest.raises(UserError, match=r"plain keeps no average of its weights.*leave out --averaged"):
        load(plain.output, averaged=True)
    assert "averaged_kl" not in read_metrics(plain.output)[-1]
    last = read_metrics(averaged.output)[-1]
    assert last["averaged_kl"] == pytest.approx(
        evaluate_run(averaged.output, teacher, averaged=True).kl, rel=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", pytest.param("partial", marks=pytest.mark.thorough)])
def test_the_average_of_trained_weights_beside_frozen_ones(
    kind: str, toy_run: RunConfig, base: str, tmp_path: Path
) -> None:
    adaptation = AdaptationConfig("lora", rank=2, alpha=4.0, targets=("q", "up"))
    if kind == "partial":
        adaptation = AdaptationConfig("partial", weights=("mlp/*",))
    run = replace(
        toy_run, output=str(tmp_path / "run"), initialise=InitConfig(source=base), adaptation=adaptation
    )
    run = averaging(run, steps=2, eval_every=2)
    train(run)
    last, averaged = read_metrics(run.output)[-1], evaluate_run(run.output, averaged=True)
    assert last["averaged_cross_entropy"] == pytest.approx(averaged.cross_entropy, rel=1e-5)
    assert last["averaged_cross_entropy"] != last["cross_entropy"]
    convert(run.output, tmp_path / "exported", averaged=True, merge=kind == "lora")
    sources = (
        open_source(run.output, averaged=True),
        open_source(tmp_path / "exported"),
        open_source(run.output),
    )
    average, exported, last_weight = (
        source.weight(WeightPlace("pairs/local_block/mlp/up", 0)) for source in sources
    )
    np.testing.assert_array_equal(exported, average)
    assert not np.array_equal(average, last_weight)


@pytest.mark.parametrize("ema", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range(ema: float) -> None:
    with pytest.raises(UserError, match=r"training\.ema is .*; it must be above 0 and below 1"):
        TrainingConfig(steps=1, accumulation=1, log_every=1, eval_every=1, ema=ema)


def test_a_checkpoint_of_another_kind_has_no_average(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a run folder, and only a run keeps an average"):
        load(tmp_path, averaged=True)
