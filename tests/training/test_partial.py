"""Training a part of a model: with every method, on a mesh, stopped and resumed, and read by every tool."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.formats.base_record import BASE_FILE
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.inspection import inspect
from gemma2_jax.formats.load import load
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.partial import Partial
from gemma2_jax.model.weights import specs_by_path
from gemma2_jax.planning.placement import find_placement
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.search import estimated_parts
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import AXES, MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.overview import describe_runs
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.parameters import partly_slow
from tests.steps import take_steps
from tests.training.methods import METHODS, beside_frozen, resumed_and_whole, rows

pytestmark = pytest.mark.thorough

PARTIAL = AdaptationConfig("partial", weights=("mlp/*", "*norm/scale"), layers=(2, 3))


@pytest.fixture(scope="module")
def run(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four layers, of which the last two are trained in part."""
    folder = tmp_path_factory.mktemp("partial")
    model = replace(toy_run.model, num_layers=4)
    base = write_teacher(toy_run, vivid(model), folder / "base")
    return beside_frozen(toy_run, PARTIAL, base, folder, model=model)


@pytest.fixture(scope="module")
def finished(run: RunConfig) -> RunConfig:
    train(run)
    return run


@partly_slow("method", METHODS, kept=("matched",))
def test_a_part_is_trained_and_resumed_with_every_method(
    finished: RunConfig, method: str, wide_teacher: str, tmp_path: Path
) -> None:
    runs = resumed_and_whole(finished, method, wide_teacher, tmp_path)
    found, expected = (load(run.output)[0].params() for run in runs)
    chex.assert_trees_all_equal(found, expected)


def test_tools_read_the_run_as_the_trained_model(finished: RunConfig, tmp_path: Path) -> None:
    base, source = load(str(finished.initialise.source))[0].params(), str(finished.initialise.source)
    model, _ = load(finished.output)
    partial = Partial(finished.model, PARTIAL.weights, PARTIAL.layers)
    for part, is_trained in zip(partial.split(model.params(), jax.random.key(0)), (True, False), strict=True):
        before = partial.split(base, jax.random.key(0))[not is_trained]
        for one, other in zip(jax.tree.leaves(part), jax.tree.leaves(before), strict=True):
            assert np.array_equal(one, other) != is_trained
    done = convert(finished.output, tmp_path / "exported")
    assert (done.source, done.target) == ("trained part of run folder", "huggingface")
    chex.assert_trees_all_equal(load(tmp_path / "exported")[0].params(), model.params())
    (row,) = (row for row in rows(finished.output) if (row["step"], row["split"]) == (5, "validation"))
    assert evaluate_run(finished.output).cross_entropy == pytest.approx(row["cross_entropy"], rel=1e-5)
    lines = dict(inspect(finished.output, {}).lines)
    assert lines["kind"] == "trained part of run folder"
    assert lines["trained"].startswith(f"{trained_count(finished):,} parameters, in ")
    assert lines["base"].startswith(f"{source}, whose weights were ")


def trained_count(run: RunConfig) -> int:
    specs = specs_by_path(build_method(run).specs["params"])
    return sum(int(np.prod(spec.shape)) for spec in specs.values())


def test_another_base_is_refused(finished: RunConfig, toy_run: RunConfig, tmp_path: Path) -> None:
    other = write_teacher(toy_run, vivid(finished.model, 2.0), tmp_path / "other")
    identity = json.loads((Path(finished.output) / BASE_FILE).read_text())["identity"][:12]
    with pytest.raises(UserError, match=rf"was trained on .* with the weights {identity} .*{other} has the"):
        train(replace(finished, initialise=InitConfig(source=other)))
    with pytest.raises(UserError, match=rf"run was trained on a base model with the weights {identity}, but"):
        convert(finished.output, tmp_path / "exported", base=other)
    folder = tmp_path / "run"
    shutil.copytree(finished.output, folder)
    (folder / BASE_FILE).write_text(json.dumps({"source": "gone", "identity": identity}))
    with pytest.raises(
        UserError, match=r"gone does not exist.*name its place, as in gemma2 convert \S+ TARGET --base"
    ):
        load(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1)])
def test_every_mesh_gives_the_same_numbers(run: RunConfig, mesh: MeshConfig) -> None:
    iterator = train_batches(run.data)
    batches = [next(iterator) for _ in range(2)]
    one, expected = take_steps(run, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), batches)
    state, found = take_steps(run, build_mesh(mesh, jax.devices()[:8]), batches)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    chex.assert_trees_all_close(state.trainable, one.trainable, atol=2e-4)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained_count(run)


def test_a_part_is_planned_and_described(run: RunConfig) -> None:
    topology, one = find_topology("cpu:1"), replace(run, mesh=MeshConfig(1, 1, 1))
    full = replace(one, adaptation=AdaptationConfig())
    plan, whole = make_plan([one], topology), make_plan([full], topology)
    count, total = trained_count(run), plan.parameters[run.name]
    assert plan.trained == {run.name: count}
    assert plan.parts.parameters == plan.parts.gradients == 4 * count
    assert plan.parts.base == 4 * (total - count)
    memory, other = plan.program.memory, whole.program.memory
    assert other.argument - memory.argument == pytest.approx(8 * (total - count), rel=0.01)
    assert memory.peak < other.peak
    shape = dict.fromkeys(AXES, 1)
    assert estimated_parts([one], [], shape).total < estimated_parts([full], [], shape).total
    placed = {model.role: model for model in find_placement([one], topology).models}
    assert set(placed) == {"student", "base"}
    assert sum(weight.device_bytes for weight in placed["student"].weights) == 4 * count
    _, line, *_ = describe_runs([run], build_mesh(run.mesh))
    assert line.startswith(f"toy: trains only {count:,} parameters, ")
    assert line.endswith("of the model's: mlp/*, *norm/scale of 2 layers")
