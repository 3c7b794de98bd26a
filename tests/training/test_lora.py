"""Training an adapter: with every method, on every mesh, stopped and resumed, and never on another base model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import FOLDER, describe_params, restore_params
from gemma2_jax.config import UserError
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.formats.base_record import BASE_FILE
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.lora import TARGETS
from gemma2_jax.model.weights import abstract_params, specs_by_path
from gemma2_jax.planning.placement import find_placement
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.search import estimated_parts
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import AXES, MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.overview import describe_runs
from gemma2_jax.training.state import initial_state
from gemma2_jax.training.together import method_of, train_together
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.parameters import partly_slow
from tests.steps import take_steps
from tests.training.methods import KL, METHODS, beside_frozen, resumed_and_whole, rows

pytestmark = pytest.mark.thorough

LORA = AdaptationConfig("lora", rank=4, alpha=8.0, dropout=0.25, targets=tuple(TARGETS))
BYTES = 4  # of a float32


@pytest.fixture(scope="module")
def lora(toy_run: RunConfig, base: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return beside_frozen(toy_run, LORA, base, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def finished(lora: RunConfig) -> RunConfig:
    train(lora)
    return lora


@partly_slow("method", METHODS, kept=("online", "on-policy"))
def test_an_adapter_is_trained_and_resumed_with_every_method(
    finished: RunConfig, method: str, wide_teacher: str, tmp_path: Path
) -> None:
    runs = resumed_and_whole(finished, method, wide_teacher, tmp_path)
    assert all(path.endswith(("/a", "/b")) for path in describe_params(runs[0].output)[1])
    trained = [trained_params(run) for run in runs]
    chex.assert_trees_all_equal(*trained)
    assert all(leaf.any() for leaf in jax.tree.leaves(trained[0]))


def trained_params(run: RunConfig) -> Any:
    specs = build_method(run).specs["params"]
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return restore_params(run.output, abstract_params(specs, mesh=mesh))


def test_another_base_is_refused(finished: RunConfig, base: str, toy_run: RunConfig, tmp_path: Path) -> None:
    other = write_teacher(toy_run, vivid(replace(toy_run.model, rope_base=9_999.0)), tmp_path / "other")
    known = json.loads((Path(finished.output) / BASE_FILE).read_text())
    assert known["source"] == base
    changed = replace(finished, initialise=InitConfig(source=other))
    message = rf"was trained on {base} with the weights {known['identity'][:12]} .*{other} has the weights"
    with pytest.raises(UserError, match=message):
        train(changed)
    folder = tmp_path / "unfinished"
    shutil.copytree(finished.output, folder)
    shutil.rmtree(folder / FOLDER / "5")
    with pytest.raises(UserError, match="was trained on"):
        train(replace(changed, output=str(folder)))
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    train(replace(finished, initialise=InitConfig(source=str(moved)), output=str(folder)))
    assert rows(str(folder)) == rows(finished.output)


def test_a_run_without_its_base_record_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(finished.output, tmp_path / "run")
    (tmp_path / "run" / BASE_FILE).unlink()
    with pytest.raises(
        UserError, match=r"base\.json is missing, which identifies the base model that the run was"
    ):
        train(replace(finished, output=str(tmp_path / "run")))


def test_another_rank_is_refused(finished: RunConfig) -> None:
    with pytest.raises(UserError, match=r"holds a run with adaptation.rank=4, but adaptation.rank is now 2"):
        train(replace(finished, adaptation=replace(LORA, rank=2)))


@partly_slow(
    "mesh",
    [
        MeshConfig(2, 2, 2),
        MeshConfig(8, 1, 1),
        MeshConfig(1, 8, 1),
        MeshConfig(data=1, replica=2, fsdp=2, sequence=2),
    ],
    kept=[MeshConfig(2, 2, 2)],
)
def test_every_mesh_gives_the_same_numbers(lora: RunConfig, mesh: MeshConfig) -> None:
    run = replace(lora, training=replace(lora.training, accumulation=1))
    iterator = train_batches(run.data)
    batches = [next(iterator) for _ in range(2)]
    size = int(np.prod([getattr(mesh, axis) for axis in AXES]))
    one, expected = take_steps(run, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), batches)
    state, found = take_steps(run, build_mesh(mesh, jax.devices()[:size]), batches)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    chex.assert_trees_all_close(state.trainable, one.trainable, atol=2e-4)
    query = state.trainable["params"]["pairs"]["local_block"]["attention"]["query"]
    weight = build_method(run).abstract_frozen(build_mesh(mesh, jax.devices()[:size]))[BASE]["pairs"]
    P, D, N, H = weight["local_block"]["attention"]["query"].sharding.spec
    assert tuple(query["a"].sharding.spec) == (P, D, None)
    assert tuple(query["b"].sharding.spec) == (P, None, N, H)
    moments = jax.tree.leaves(state.optimizer)
    assert sum(leaf.size for leaf in moments if leaf.ndim) == 2 * sum(
        leaf.size for leaf in jax.tree.leaves(state.trainable)
    )


def test_an_adapter_is_planned(lora: RunConfig) -> None:
    topology = find_topology("cpu:1")
    run = replace(
        lora, mesh=MeshConfig(1, 1, 1), compute=replace(lora.compute, dtype="bfloat16", remat="full")
    )
    full = make_plan([replace(run, adaptation=AdaptationConfig())], topology)
    plan = make_plan([run], topology)
    (count,) = plan.trained.values()
    (model,) = plan.parameters.values()
    assert count == sum(
        int(np.prod(spec.shape)) for spec in specs_by_path(build_method(run).specs["params"]).values()
    )
    assert full.trained == full.parameters
    assert full.parts.base == 0
    assert plan.parts.parameters == plan.parts.gradients == BYTES * count
    assert 2 * BYTES * count <= plan.parts.moments < 2 * BYTES * count + 64
    norms = run.model.d_model * (4 * run.model.num_layers + 1)
    assert plan.parts.base == 2 * model + 2 * norms  # bfloat16, except for the norms' scales
    assert plan.program.memory.argument < 0.35 * full.program.memory.argument
    saved = plan.tokens * (2 * model - 6 * count)  # no gradients of the base, but products with the adapter
    assert plan.model_flops == pytest.approx(full.model_flops - saved)
    assert plan.to_dict()["trained_parameters"] == {run.name: count}
    shape = dict.fromkeys(AXES, 1)
    whole = replace(run, adaptation=AdaptationConfig())
    assert estimated_parts([run], [], shape).total < estimated_parts([whole], [], shape).total
    placed = {model.role: model for model in find_placement([run], topology).models}
    assert set(placed) == {"adapter", "base"}
    assert sum(weight.device_bytes for weight in placed["adapter"].weights) == BYTES * count


def test_the_number_of_trained_parameters_is_shown(lora: RunConfig) -> None:
    _, line, *_ = describe_runs([lora], build_mesh(lora.mesh))
    count = sum(
        int(np.prod(spec.shape)) for spec in specs_by_path(build_method(lora).specs["params"]).values()
    )
    assert line.startswith(f"toy: trains only {count:,} parameters of an adapter, ")
    assert line.endswith("of the model's: rank 4, on q, k, v, o, gate, up, down of all layers")


@pytest.fixture
def students(lora: RunConfig, wide_teacher: str, tmp_path: Path) -> dict[str, RunConfig]:
    """Runs with adapters of two kinds on the same base, one that trains some weights, and one that trains all."""
    adaptations = {
        "first": LORA,
        "second": replace(LORA, rank=2, targets=("q", "v"), layers=(1,), dropout=0.0),
        "part": AdaptationConfig("partial", weights=("mlp/*",), layers=(1,)),
        "full": AdaptationConfig(),
    }
    distill = DistillConfig(wide_teacher, "float32")
    return {
        name: replace(
            lora,
            name=name,
            output=str(tmp_path / name),
            objective=KL,
            distill=distill,
            adaptation=adaptation,
            seed=seed,
        )
        for seed, (name, adaptation) in enumerate(adaptations.items())
    }


def test_students_with_adapters_share_their_base(students: dict[str, RunConfig]) -> None:
    method = method_of(list(students.values()))
    base = method.abstract_frozen(build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))[BASE]
    assert set(base) == {"first", "part", "full"}  # the second has the first one's
    assert not base["full"]


def test_students_with_adapters_share_a_teacher(students: dict[str, RunConfig], tmp_path: Path) -> None:
    train_together(list(students.values()))
    for name in ("first", "part"):
        alone = replace(students[name], output=str(tmp_path / "alone" / name))
        train(alone)
        for found, expected in zip(rows(students[name].output), rows(alone.output), strict=True):
            assert found.pop("split") == expected.pop("split")
            assert found == pytest.approx(expected, rel=1e-4)
    assert set(trained_params(students["second"])["pairs"]) == {"global_block"}
    assert not (Path(students["full"].output) / BASE_FILE).exists()


@pytest.mark.parametrize(
    ("initialise", "message"),
    [
        (
            InitConfig(),
            r"adaptation.kind is lora and initialise.source is null; the frozen weights come from a checkpoint: write",
        ),
        (
            InitConfig("base", layers="even"),
            r"adaptation.kind is lora and initialise.layers is set; the frozen weights are those",
        ),
        (InitConfig("base", width="first"), r"adaptation.kind is lora and initialise.width is set"),
    ],
)
def test_an_adapter_needs_a_base(lora: RunConfig, initialise: InitConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(lora, initialise=initialise)


def test_a_rank_above_a_dimension_is_refused(lora: RunConfig) -> None:
    with pytest.raises(
        UserError, match=r"adaptation.rank is 33, but q is a matrix of 32 x 32; choose a rank of at"
    ):
        replace(lora, adaptation=replace(LORA, rank=33))


def test_dropout_depends_on_the_step_and_is_off_in_validations(lora: RunConfig) -> None:
    method, mesh = build_method(lora), build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    without = build_method(replace(lora, adaptation=replace(LORA, dropout=0.0)))
    batch = jax.tree.map(jnp.asarray, next(train_batches(lora.data)))
    with jax.set_mesh(mesh):
        state, base = initial_state(lora, method, mesh)
        # With B at zero, the adapter has no effect.
        trainable = jax.tree.map(lambda leaf: leaf + 0.1, state.trainable)

        def loss(method: Any, step: int, batch: Any = batch) -> float:
            return float(jax.jit(method.loss)(trainable, {BASE: base}, batch, jnp.int32(step))[0])

        assert loss(method, 3) == loss(method, 3)
        assert len({loss(method, 3), loss(method, 4), loss(without, 3)}) == 3
        assert loss(without, 3) == loss(without, 4)
        other_seed = build_method(replace(lora, seed=lora.seed + 1))
        assert loss(other_seed, 3) != loss(method, 3)
        # A microbatch with the same tokens at other places has other masks; without dropout its loss is the same.
        shifted = replace(batch, positions=batch.positions + 1)
        assert loss(without, 3, shifted) == pytest.approx(loss(without, 3), rel=1e-4)
        assert loss(method, 3, shifted) != pytest.approx(loss(method, 3), rel=1e-4)
        found, expected = (
            jax.jit(each.evaluate)(trainable, {BASE: base}, batch) for each in (method, without)
        )
    chex.assert_trees_all_equal(found, expected)
