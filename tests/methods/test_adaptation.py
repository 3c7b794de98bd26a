"""An adaptation that the package does not have works with every method: here, one that trains only the norms."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import restore_params
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import Frozen, Trainable
from gemma2_jax.methods.students import Students
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, Weight, abstract_params, init_params, weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.state import Update, initial_state
from gemma2_jax.training.step import build_train_step
from gemma2_jax.training.teacher_cache import write_cache
from gemma2_jax.training.together import Updates
from tests.steps import prepared
from tests.training.stops import stopped_after

pytestmark = pytest.mark.usefixtures("one_device")

KL = ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48)


def chosen(tree: Any, norms: bool) -> Any:
    """The part of a nested dict that is norms' scales, or the rest of it."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inside := chosen(value, norms):
                found[name] = inside
        elif (name == "scale") == norms:
            found[name] = value
    return found


def merged(one: Any, other: Any) -> Any:
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return other if one is None else one
    return {name: merged(one.get(name), other.get(name)) for name in {**one, **other}}


class NormsOnly:
    """Trains the norms' scales."""

    def specs(self, model: Any) -> tuple[Any, Any]:
        return chosen(model, True), chosen(model, False)

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return chosen(params, True), chosen(params, False)

    def join(self, trained: Params, frozen: Params) -> Params:
        return merged(trained, frozen)


@pytest.fixture(scope="module")
def teacher(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = replace(toy_run, output=str(tmp_path_factory.mktemp("adapted") / "teacher"))
    train(run)
    return run


@pytest.fixture(
    scope="module",
    params=[
        "text",
        *(
            pytest.param(kind, marks=mark)
            for mark, kinds in (
                (pytest.mark.thorough, ("online", "on-policy")),
                (pytest.mark.slow, ("matched", "cached")),
            )
            for kind in kinds
        ),
    ],
)
def run(request: Any, toy_run: RunConfig, tmp_path_factory: Any) -> RunConfig:
    folder = tmp_path_factory.mktemp("adapted")
    run = replace(toy_run, name=request.param, output=str(folder / "run"))
    if request.param == "text":
        return run
    distill = DistillConfig(request.getfixturevalue("teacher").output, "float32")
    if request.param == "matched":
        distill = replace(distill, match=MatchConfig(((0, 0), (1, 1)), hidden=1.0))
    if request.param == "on-policy":
        distill = replace(distill, on_policy=OnPolicyConfig(fraction=0.5, prompt_tokens=8))
    if request.param == "cached":
        distill = replace(distill, cache=str(folder / "cache"), encoding=EncodingConfig("top_k", 8))
    run = replace(run, objective=KL, distill=distill)
    if request.param == "cached":
        write_cache(run)
    return run


def test_the_norms_are_trained_and_nothing_else(run: RunConfig) -> None:
    method = build_method(run, NormsOnly())
    with stopped_after(4):
        train(run, method)
    (before,) = rows_at(run, 4, "train")
    train(
        run, method
    )  # from the checkpoint of step 3, which holds only the norms, with the same frozen weights
    assert rows_at(run, 4, "train") == [before]
    (last,) = rows_at(run, run.training.steps, "validation")
    assert np.isfinite(last["cross_entropy"])
    specs = weight_specs(run.model)
    target = abstract_params(chosen(specs, True), mesh=build_mesh(run.mesh))
    trained = restore_params(run.output, target)  # refuses anything more, or less
    begun = chosen(init_params(specs, jax.random.key(run.seed)), True)
    for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(begun), strict=True):
        assert not np.array_equal(one, other)


def rows_at(run: RunConfig, step: int, split: str) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in ("tokens_per_second", "seconds", "mfu")}
        for row in read_metrics(run.output)
        if (row["step"], row["split"]) == (step, split)
    ]


@pytest.mark.thorough
def test_it_is_planned_with_moments_of_the_norms_alone(run: RunConfig) -> None:
    topology = find_topology("cpu:1")
    adapted = make_plan([run], topology, build_method(run, NormsOnly())).program.memory.argument
    assert adapted < 0.6 * make_plan([run], topology).program.memory.argument


@pytest.mark.thorough
def test_students_with_it_have_the_losses_of_each_alone(toy_run: RunConfig) -> None:
    """Students of a wider teacher; one, called like the teacher's tree, also matches layers, with projections."""
    sizes = replace(toy_run.model, d_model=48)
    distill = DistillConfig("given to the step", "float32", model=sizes)
    match = MatchConfig(((0, 1), (1, 0)), hidden=0.5)
    configs = {
        "one": replace(toy_run, objective=KL, distill=distill),
        "teacher": replace(
            toy_run,
            seed=5,
            objective=ObjectiveConfig(0.5, 0.0, temperature=2.0, block_tokens=30, jsd=0.5),
            distill=replace(distill, match=match),
        ),
    }
    methods = {name: build_method(config, NormsOnly()) for name, config in configs.items()}
    iterator = train_batches(toy_run.data)
    batches = [next(iterator) for _ in range(3)]
    teacher = Gemma2.init(sizes, jax.random.key(7))
    mesh = build_mesh(toy_run.mesh, jax.devices()[:1])
    students = Students(methods)
    updates = {name: Update(configs[name], methods[name].specs) for name in configs}
    with jax.set_mesh(mesh):
        alone: dict[str, list[Any]] = {}
        states, bases = {}, {}
        for name, config in configs.items():
            step, state, frozen = prepared(config, mesh, teacher, methods[name])
            alone[name] = []
            for batch in batches:
                state, row = step(state, frozen, batch)
                alone[name].append(row)
            states[name], bases[name] = initial_state(config, methods[name], mesh)
        abstract = {name: update.abstract_state(mesh) for name, update in updates.items()}
        step = build_train_step(students, Updates(updates), abstract, toy_run.layout)
        for number, batch in enumerate(batches):
            states, metrics = step(states, {"base": bases, "teacher": teacher}, batch)
            for name in configs:
                expected = alone[name][number]
                assert metrics[name].keys() == expected.keys()
                for key, value in expected.items():
                    assert float(metrics[name][key]) == pytest.approx(float(value), rel=2e-5), key
    assert metrics["teacher"]["match_hidden"] > 0


class NothingTrained:
    """Freezes the whole model."""

    def specs(self, model: Any) -> tuple[Any, Any]:
        return {}, model

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return {}, params

    def join(self, trained: Params, frozen: Params) -> Params:
        return frozen


class Probe(LanguageModelling):
    """Trains a vector that predicts from the hidden states whether the next token's id is odd."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, NothingTrained())
        self.specs["probe"] = {"vector": Weight("D", (config.model.d_model,), fan_in="D")}

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        found = self.evaluate(trainable, frozen, batch)
        return found["error"], {"loss": found["error"], **found}

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        model = Gemma2(self.config.model, frozen["base"])
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids, self.config.compute)
        error = jnp.square(hidden @ trainable["probe"]["vector"] - batch.targets % 2)
        return {"error": jnp.sum(error * batch.loss_mask), "targets": jnp.sum(batch.loss_mask)}


def test_a_head_is_trained_on_a_model_that_is_frozen_whole(toy_run: RunConfig, tmp_path: Path) -> None:
    run = replace(toy_run, output=str(tmp_path / "probe"))
    with stopped_after(4):
        train(run, Probe(run))
    (before,) = rows_at(run, 4, "train")
    train(run, Probe(run))  # from the checkpoint of step 3
    assert rows_at(run, 4, "train") == [before]
    (first,), (last,) = rows_at(run, 1, "train"), rows_at(run, run.training.steps, "train")
    assert last["error"] < first["error"]
