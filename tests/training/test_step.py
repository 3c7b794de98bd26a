"""The training step: the same numbers on every mesh, and only trained arrays change."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.kernels.lm_head import LMHead, dense_sums
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import map_specs, weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig, build_coefficients, token_loss
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import AXES, MeshConfig, build_mesh
from gemma2_jax.training.optimizer import build_optimizer
from gemma2_jax.training.state import TrainState
from tests.heads import student_and_teacher
from tests.parameters import mostly_thorough
from tests.programs import arrays
from tests.steps import prepared, take_steps

DISTILLATION = ObjectiveConfig(cross_entropy=0.25, forward_kl=0.75, temperature=2.0, block_tokens=48)
ONE_DEVICE = MeshConfig(1, 1, 1)


@pytest.fixture(scope="module")
def run(toy_run: RunConfig) -> RunConfig:
    return replace(toy_run, data=replace(toy_run.data, batch_size=16))


@pytest.fixture(scope="module")
def batches(run: RunConfig) -> list[Batch]:
    iterator = train_batches(run.data)
    return [next(iterator) for _ in range(3)]


def with_teacher(run: RunConfig, objective: ObjectiveConfig) -> RunConfig:
    """The run with a teacher that is wider and deeper than the student and passed to the step."""
    sizes = replace(run.model, d_model=48, num_layers=4)
    distill = replace(run.distill, teacher="given to the step", model=sizes)
    return replace(run, objective=objective, distill=distill)


def mesh_of(config: MeshConfig) -> Mesh:
    devices = math.prod(getattr(config, axis) for axis in AXES)
    return build_mesh(config, jax.devices()[:devices])


def a_teacher(run: RunConfig) -> Gemma2:
    assert run.distill.model is not None
    return Gemma2.init(run.distill.model, jax.random.key(7))


def steps(
    run: RunConfig, mesh_config: MeshConfig, batches: list[Batch], teacher: bool = False
) -> tuple[TrainState, list[dict[str, float]]]:
    """Train on the batches, one step each."""
    return take_steps(run, mesh_of(mesh_config), batches, a_teacher(run) if teacher else None)


Alone = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def alone(batches: list[Batch]) -> Alone:
    """The metrics that `steps` returns for the batches on one device; each run is computed once."""
    known: dict[tuple[str, bool], list[dict[str, float]]] = {}

    def rows(run: RunConfig, teacher: bool = False) -> list[dict[str, float]]:
        key = repr(run), teacher
        if key not in known:
            known[key] = steps(run, ONE_DEVICE, batches, teacher)[1]
        return [dict(row) for row in known[key]]

    return rows


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(8, 1, 1), id="data", marks=pytest.mark.thorough),
        pytest.param(MeshConfig(1, 8, 1), id="fsdp", marks=pytest.mark.thorough),
        pytest.param(MeshConfig(2, 2, 2), id="all-three"),
        pytest.param(
            MeshConfig(data=1, replica=2, fsdp=2, sequence=2),
            id="replica-fsdp-sequence",
            marks=pytest.mark.thorough,
        ),
    ],
)
@pytest.mark.parametrize(
    "distilled",
    [
        pytest.param(False, id="pretraining", marks=pytest.mark.thorough),
        pytest.param(True, id="distillation"),
    ],
)
@pytest.mark.thorough
def test_same_losses_on_one_device_and_on_eight(
    run: RunConfig, batches: list[Batch], alone: Alone, mesh: MeshConfig, distilled: bool
) -> None:
    if distilled:
        run = with_teacher(run, DISTILLATION)
    one = alone(run, teacher=distilled)
    _, eight = steps(run, mesh, batches, teacher=distilled)
    for expected, found in zip(one, eight, strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            # Only the order of float32 additions differs (about 1e-7 each). Adam divides by gradients' size,
            # which can turn that into a visible change of a weight whose gradient is all rounding, so after
            # an update losses agree to 1e-5 rather than 1e-7.
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.thorough
def test_tensor_axis_alone(run: RunConfig, batches: list[Batch]) -> None:
    run = replace(run, model=replace(run.model, num_heads=8, num_kv_heads=8))
    _, one = steps(run, ONE_DEVICE, batches)
    _, eight = steps(run, MeshConfig(1, 1, 8), batches)
    assert [row["loss"] for row in eight] == pytest.approx([row["loss"] for row in one], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "momentum", "moments_of_matrices"),
    [("adamw", None, 2), pytest.param("muon", 0.95, 1, marks=pytest.mark.thorough)],
)
@pytest.mark.thorough
def test_moments_are_sharded_like_their_parameters(
    run: RunConfig,
    batches: list[Batch],
    alone: Alone,
    kind: Any,
    momentum: float | None,
    moments_of_matrices: int,
) -> None:
    run = replace(run, optimizer=replace(run.optimizer, kind=kind, momentum=momentum))
    state, metrics = steps(run, MeshConfig(2, 2, 2), batches[:2])
    assert [row["loss"] for row in metrics] == pytest.approx(
        [row["loss"] for row in alone(run)[:2]], rel=1e-5
    )
    arrays_by_path = jax.tree_util.tree_leaves_with_path(state.optimizer["params"])
    for path, param in jax.tree_util.tree_leaves_with_path(state.trainable["params"]):
        moments = [array for above, array in arrays_by_path if above[-len(path) :] == path]
        is_matrix = any(entry.key in ("attention", "mlp") for entry in path)
        assert len(moments) == (moments_of_matrices if is_matrix else 2)
        for moment in moments:
            assert moment.sharding.is_equivalent_to(param.sharding, moment.ndim)
            on_this_device = moment.addressable_shards[0].data.size
            assert on_this_device == param.addressable_shards[0].data.size
            assert on_this_device < moment.size  # every weight has an axis along fsdp


def test_accumulation_changes_nothing(run: RunConfig, batches: list[Batch]) -> None:
    # Rows of a real batch differ in how many targets they have; make that sure here.
    thinned = np.arange(32) % (np.arange(16)[:, None] + 1) == 0
    uneven = [replace(batch, loss_mask=batch.loss_mask * thinned) for batch in batches]
    whole_state, whole = steps(run, ONE_DEVICE, uneven)
    accumulating = replace(run, training=replace(run.training, accumulation=4))
    parts_state, parts = steps(accumulating, ONE_DEVICE, uneven)
    for expected, found in zip(whole, parts, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    # 3 Adam steps of 1e-2
    chex.assert_trees_all_close(whole_state.trainable["params"], parts_state.trainable["params"], atol=5e-4)


@pytest.mark.thorough
def test_accumulation_on_a_mesh(run: RunConfig, batches: list[Batch], alone: Alone) -> None:
    accumulating = replace(run, training=replace(run.training, accumulation=2))
    one = alone(run)
    _, eight = steps(accumulating, MeshConfig(2, 4, 1), batches)
    assert [row["loss"] for row in eight] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_the_first_loss_is_that_of_all_logits_at_once(
    run: RunConfig, batches: list[Batch], alone: Alone
) -> None:
    run = with_teacher(run, DISTILLATION)
    rows = alone(run, teacher=True)
    batch = batches[0]
    student = Gemma2.init(run.model, jax.random.key(run.seed))
    teacher = a_teacher(run)

    def head(model: Gemma2) -> LMHead:
        return model.head(model.hidden(batch.tokens, batch.positions, batch.segment_ids))

    total, metrics = dense_sums(
        token_loss(DISTILLATION),
        *student_and_teacher(head(student), head(teacher), batch.targets),
        batch.loss_mask,
        build_coefficients(DISTILLATION, run.training.steps)(0),
    )
    assert rows[0]["loss"] == pytest.approx(float(total / batch.loss_mask.sum()), rel=1e-5)
    assert rows[0]["kl"] == pytest.approx(float(metrics["kl"] / batch.loss_mask.sum()), rel=1e-5)


def test_masked_targets_do_not_count(run: RunConfig, batches: list[Batch]) -> None:
    batch = batches[0]
    mask = np.array(batch.loss_mask)
    mask[:, 10:20] = 0
    targets = np.array(batch.targets)
    targets[:, 10:20] = 5
    _, (masked,) = steps(run, ONE_DEVICE, [replace(batch, loss_mask=mask)])
    _, (changed,) = steps(run, ONE_DEVICE, [replace(batch, loss_mask=mask, targets=targets)])
    _, (whole,) = steps(run, ONE_DEVICE, [batch])
    assert masked == changed
    assert masked["targets"] == mask.sum() < whole["targets"]
    assert masked["loss"] != whole["loss"]


def test_a_batch_without_targets_is_no_nan(run: RunConfig, batches: list[Batch]) -> None:
    empty = replace(batches[0], loss_mask=np.zeros_like(batches[0].loss_mask))
    state, (row,) = steps(run, ONE_DEVICE, [empty])
    assert row["loss"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.trainable["params"]))


def test_norms_do_not_decay(run: RunConfig) -> None:
    constant = replace(run.optimizer, warmup_steps=0, schedule="constant", final_fraction=1.0)
    optimizer = build_optimizer(constant, run.training.steps, weight_specs(run.model))
    params = jax.tree.map(jnp.ones_like, Gemma2.init(run.model, jax.random.key(0)).params())
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
    is_norm = map_specs(lambda path, _: path.endswith("norm/scale"), weight_specs(run.model))
    for update, norm in zip(jax.tree.leaves(updates), jax.tree.leaves(is_norm), strict=True):
        expected = 0.0 if norm else -run.optimizer.learning_rate * run.optimizer.weight_decay
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_nothing(run: RunConfig, alone: Alone, remat: Any) -> None:
    recomputed = alone(replace(run, compute=replace(run.compute, remat=remat)))
    for expected, found in zip(alone(run), recomputed, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
def test_offload_leaves_each_device_its_part(run: RunConfig, batches: list[Batch], alone: Alone) -> None:
    offloaded = replace(run, compute=replace(run.compute, remat="offload"))
    _, found = steps(offloaded, MeshConfig(2, 2, 2), batches[:1])
    assert found == [pytest.approx(alone(run)[0], rel=1e-5)]


@pytest.mark.thorough
def test_parameters_stay_float32_when_computing_in_bfloat16(
    run: RunConfig, batches: list[Batch], alone: Alone
) -> None:
    exact = alone(run)
    state, rounded = steps(replace(run, compute=replace(run.compute, dtype="bfloat16")), ONE_DEVICE, batches)
    for leaf in jax.tree.leaves((state.trainable["params"], optax.tree.get(state.optimizer["params"], "mu"))):
        assert leaf.dtype == jnp.float32
    assert [row["loss"] for row in rounded] == pytest.approx([row["loss"] for row in exact], rel=1e-2)
    assert [row["loss"] for row in rounded] != [row["loss"] for row in exact]


@pytest.mark.thorough
def test_distillation_lowers_the_divergence(run: RunConfig, batches: list[Batch]) -> None:
    """Pure forward KL on one repeated batch."""
    run = with_teacher(run, ObjectiveConfig(0.0, 1.0, 1.0, 48))
    _, rows = steps(run, ONE_DEVICE, batches[:1] * 30, teacher=True)
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]


SCHEDULED = ObjectiveConfig(
    cross_entropy=1.0,
    forward_kl=0.5,
    reverse_kl=0.5,
    temperature=ScheduleConfig("linear", peak=3.0, end=1.0),
    mix=ScheduleConfig("linear", start=0.0, peak=1.0, end=0.5, warmup_steps=1),
    block_tokens=48,
)


@pytest.mark.thorough
def test_a_schedule_is_followed(run: RunConfig, alone: Alone) -> None:
    rows = alone(with_teacher(run, SCHEDULED), teacher=True)
    assert [row["temperature"] for row in rows] == pytest.approx(
        [3 - 2 * i / 7 for i in range(3)]
    )  # of 8 steps
    assert [row["mix"] for row in rows] == pytest.approx([0.0, 1.0, 1 - 0.5 / 6])
    for row in rows:
        divergence = 0.5 * row["kl"] + 0.5 * row["reverse_kl"]
        expected = row["mix"] * divergence + (1 - row["mix"]) * row["cross_entropy"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
def test_microbatches_share_what_is_scheduled(run: RunConfig, alone: Alone) -> None:
    run = with_teacher(run, SCHEDULED)
    accumulating = replace(run, training=replace(run.training, accumulation=4))
    parts = alone(accumulating, teacher=True)
    for expected, found in zip(alone(run, teacher=True), parts, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 2])
def test_targets_of_a_batch_train_as_their_teacher(
    run: RunConfig, batches: list[Batch], alone: Alone, accumulation: int
) -> None:
    """The teacher's whole distribution, as in a cache, replaces its forward pass within the step."""
    run = with_teacher(run, DISTILLATION)
    run = replace(run, training=replace(run.training, accumulation=accumulation))
    temperature = DISTILLATION.temperature
    assert isinstance(temperature, float)
    expected = alone(run, teacher=True)[:2]
    teacher = a_teacher(run)

    @jax.jit
    def with_targets(batch: Batch) -> Batch:
        hidden = teacher.hidden(batch.tokens, batch.positions, batch.segment_ids)
        log_p = jax.nn.log_softmax(teacher.embedder.decode(hidden) / temperature)
        ids = jnp.broadcast_to(jnp.arange(log_p.shape[-1], dtype=jnp.int32), log_p.shape)
        sparse = SparseTargets(ids, log_p, jnp.zeros(log_p.shape[:2]))
        return replace(batch, extra={"teacher_targets": sparse})

    _, rows = take_steps(run, mesh_of(ONE_DEVICE), [with_targets(batch) for batch in batches[:2]])
    assert rows == [pytest.approx(row, rel=1e-5) for row in expected]


@pytest.mark.thorough
def test_a_schedule_compiles_nothing_again(run: RunConfig, batches: list[Batch]) -> None:
    run = with_teacher(run, SCHEDULED)
    mesh = mesh_of(ONE_DEVICE)
    with jax.set_mesh(mesh):
        step, state, frozen = prepared(run, mesh, a_teacher(run))
        state, _ = step(state, frozen, on_mesh(batches[0], mesh))
        with jax.no_tracing():
            for batch in batches[1:]:
                state, _ = step(state, frozen, on_mesh(batch, mesh))
    assert int(state.step) == 3


@mostly_thorough("break_in", ["loss", "gradients"])
@mostly_thorough("accumulation", [1, 2])
def test_a_step_that_is_not_finite_leaves_the_state(
    run: RunConfig, batches: list[Batch], break_in: str, accumulation: int
) -> None:
    """The state, including the optimizer's, is equal bit for bit; the gradient norm is NaN, at which a run stops."""
    run = replace(run, training=replace(run.training, accumulation=accumulation))
    mesh, mask = mesh_of(ONE_DEVICE), np.array(batches[1].loss_mask)
    # Huge weights that cancel: the loss is finite, and the gradients' squares are not.
    mask[0, 3:5] = [np.nan, 0.0] if break_in == "loss" else [1e30, -1e30]
    broken = replace(batches[1], loss_mask=mask)
    with jax.set_mesh(mesh):
        step, state, frozen = prepared(run, mesh)
        state, row = step(state, frozen, on_mesh(batches[0], mesh))
        assert np.isfinite(row["gradient_norm"])
        before = jax.tree.map(np.asarray, state)
        state, row = step(state, frozen, on_mesh(broken, mesh))
        assert np.isnan(row["gradient_norm"])
        assert np.isfinite(row["loss"]) == (break_in == "gradients")
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), before)
        assert int(state.step) == 1
        state, row = step(state, frozen, on_mesh(batches[2], mesh))
    assert int(state.step) == 2
    assert np.isfinite(row["gradient_norm"])


def test_no_step_holds_logits_of_all_tokens(run: RunConfig, batches: list[Batch]) -> None:
    """Neither the student's nor the teacher's, forward or backward: the largest array has block_tokens rows."""
    run = with_teacher(run, DISTILLATION)
    step, state, frozen = prepared(run, mesh_of(ONE_DEVICE), a_teacher(run))
    jaxpr = jax.make_jaxpr(step)(state, frozen, batches[0])
    V, tokens = run.model.vocab_size, batches[0].tokens.size
    sizes = [size for shape, size in arrays(jaxpr.jaxpr) if V in shape and not {32, 48} & set(shape)]
    assert max(sizes) <= DISTILLATION.block_tokens * V < tokens * V


def test_the_stages_of_a_step_have_names(run: RunConfig, batches: list[Batch]) -> None:
    """A profile shows these names."""
    run = with_teacher(run, DISTILLATION)
    step, state, frozen = prepared(run, mesh_of(ONE_DEVICE), a_teacher(run))
    program = step.lower(state, frozen, batches[0]).as_text(debug_info=True)
    for stage in ("embed", "attention", "mlp", "final_norm", "teacher", "loss", "optimizer"):
        assert re.search(rf'["/(]{stage}[/)"]', program), stage
