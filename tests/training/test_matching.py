"""Matching in the step and in whole runs: training, saving, resuming, and exports without projections."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from gemma2_jax.checkpoints.store import CheckpointStore, latest_step, load_model
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.layouts import HUGGINGFACE, expand
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training import run_folder
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.state import TrainState, Update
from tests.steps import prepared, take_steps
from tests.training.stops import stopped_after

MATCH = MatchConfig(((0, 2), (1, 3)), hidden=0.5, attention=2.0)
ONE_DEVICE = MeshConfig(1, 1, 1)
METRICS = ("match_hidden", "match_attention")


@pytest.fixture(scope="module")
def run(toy_run: RunConfig) -> RunConfig:
    """Matching in addition to forward KL, with a teacher passed to the step."""
    return replace(
        toy_run,
        data=replace(toy_run.data, batch_size=16),
        objective=ObjectiveConfig(cross_entropy=0.25, forward_kl=0.75, temperature=1.0, block_tokens=48),
        distill=DistillConfig("given to the step", "float32", match=MATCH),
    )


@pytest.fixture(scope="module")
def batches(run: RunConfig) -> list[Batch]:
    """Batches whose rows have very different numbers of targets."""
    thinned = np.arange(32) % (np.arange(16)[:, None] + 1) == 0
    iterator = train_batches(run.data)
    found = [next(iterator) for _ in range(2)]
    return [replace(batch, loss_mask=batch.loss_mask * thinned) for batch in found]


def of_width(run: RunConfig, width: int) -> tuple[RunConfig, Gemma2]:
    """The run with the sizes of a teacher of a width, and that teacher."""
    sizes = replace(run.model, d_model=width, num_layers=4, num_heads=8, num_kv_heads=4)
    return replace(run, distill=replace(run.distill, model=sizes)), Gemma2.init(sizes, jax.random.key(7))


def begun(run: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step."""
    run, teacher = of_width(run, 48)
    with jax.set_mesh(mesh):
        return prepared(run, mesh, teacher)[1]


def steps(
    run: RunConfig, mesh_config: MeshConfig, batches: list[Batch], width: int = 48
) -> tuple[TrainState, list[dict[str, float]]]:
    """Train on the batches, one step each."""
    devices = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
    mesh = build_mesh(mesh_config, jax.devices()[:devices])
    run, teacher = of_width(run, width)
    return take_steps(run, mesh, batches, teacher)


def projections_of(state: TrainState) -> jax.Array:
    projections: jax.Array = state.trainable["matching"]["projections"]
    return projections


@pytest.fixture(scope="module")
def on_one_device(run: RunConfig, batches: list[Batch]) -> tuple[TrainState, list[dict[str, float]]]:
    return steps(run, ONE_DEVICE, batches)


@pytest.mark.thorough
def test_the_loss_is_the_weighted_sum(on_one_device: Any) -> None:
    for row in on_one_device[1]:
        objective = 0.25 * row["cross_entropy"] + 0.75 * row["kl"]
        matched = 0.5 * row["match_hidden"] + 2.0 * row["match_attention"]
        assert row["loss"] == pytest.approx(objective + matched, rel=1e-5)
        assert 0 < row["match_attention"] < 1 < row["match_hidden"] < 5


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [(ONE_DEVICE, 4), (MeshConfig(2, 4, 1), 2), (MeshConfig(2, 2, 2), 1)],
    ids=["accumulation", "data-and-fsdp", "all-three"],
)
def test_accumulation_and_meshes_change_nothing(
    run: RunConfig, batches: list[Batch], on_one_device: Any, mesh: MeshConfig, accumulation: int
) -> None:
    expected_state, expected = on_one_device
    run = replace(run, training=replace(run.training, accumulation=accumulation))
    state, found = steps(run, mesh, batches)
    in_parts = projections_of(state).addressable_shards[0].data.shape
    assert in_parts == (2, 32 // mesh.fsdp, 48)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    # After one Adam step of 5e-3, the first having rate 0.
    np.testing.assert_allclose(projections_of(state), projections_of(expected_state), atol=5e-4)


@pytest.mark.thorough
def test_projections_and_their_moments_are_sharded(run: RunConfig) -> None:
    state = begun(run, build_mesh(MeshConfig(1, 4, 2)))
    moments = [optax.tree.get(state.optimizer["matching"], name)["projections"] for name in ("mu", "nu")]
    for array in (projections_of(state), *moments):
        assert array.shape == (2, 32, 48)
        assert array.dtype == jnp.float32
        assert array.addressable_shards[0].data.shape == (2, 8, 48)


@pytest.mark.thorough
def test_projections_begin_as_weights_do_and_are_trained(run: RunConfig, on_one_device: Any) -> None:
    mesh = build_mesh(ONE_DEVICE, jax.devices()[:1])
    other = begun(replace(run, seed=1), mesh)
    before, after = (np.asarray(projections_of(state)) for state in (begun(run, mesh), on_one_device[0]))
    assert np.std(before) == pytest.approx(32**-0.5, rel=0.05)
    assert not np.array_equal(before, projections_of(other))
    assert np.abs(after - before).max(axis=(1, 2)).min() > 1e-3  # each pair's own


@pytest.mark.thorough
def test_a_teacher_as_wide_as_the_student_needs_none(run: RunConfig, batches: list[Batch]) -> None:
    state, rows = steps(run, ONE_DEVICE, batches[:1], width=32)
    assert set(state.trainable) == {"params"}
    assert all(rows[0][name] > 0 for name in METRICS)


@pytest.mark.thorough
def test_training_lowers_both_distances(run: RunConfig, batches: list[Batch]) -> None:
    """Also without a divergence, when the teacher's logits are not computed."""
    objective = replace(run.objective, cross_entropy=1.0, forward_kl=0.0)
    _, rows = steps(replace(run, objective=objective), ONE_DEVICE, batches[:1] * 20)
    assert "kl" not in rows[0]
    for name in METRICS:
        assert rows[-1][name] < 0.8 * rows[0][name]


@pytest.fixture(scope="module")
def finished(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run that matched a teacher of another width."""
    folder = tmp_path_factory.mktemp("runs")
    model = replace(toy_run.model, d_model=48, num_layers=4)
    training = replace(toy_run.training, steps=2, eval_every=2)
    teacher = replace(toy_run, output=str(folder / "teacher"), model=model, training=training)
    config = replace(
        toy_run, output=str(folder / "whole"), distill=DistillConfig(teacher.output, "float32", match=MATCH)
    )
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)
        train(teacher)
        train(config)
    return config


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


def saved(config: RunConfig) -> dict[str, Any]:
    """All trees of the last checkpoint."""
    mesh = build_mesh(ONE_DEVICE, jax.devices()[:1])
    update = Update(config, build_method(config).specs)
    with CheckpointStore(config.output, keep=2) as store:
        trees = run_folder._trees(update.abstract_state(mesh))
        return store.restore(8, trees, train_batches(config.data))


@pytest.mark.thorough
def test_a_resumed_run_is_bit_identical(finished: RunConfig, tmp_path: Path, one_device: None) -> None:
    config = replace(finished, output=str(tmp_path / "cut"))
    with stopped_after(5):
        train(config)
    train(config)
    whole, cut = (
        [{name: row[name] for name in ("step", "loss", *METRICS)} for row in read_metrics(each.output)[:8]]
        for each in (finished, config)
    )
    assert whole == cut
    found = saved(config)
    assert set(found) == {"params", "optimizer", "matching"}
    chex.assert_trees_all_equal(found, saved(finished))


@pytest.mark.thorough
def test_projections_that_an_older_version_saved_are_refused(
    finished: RunConfig, tmp_path: Path, one_device: None
) -> None:
    """Older items hold them, and their optimizer state, under other names."""
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    trees = saved(finished)

    def is_tree(node: Any) -> bool:
        return isinstance(node, dict) and set(node) == {"projections"}

    moments = jax.tree.map(
        lambda node: node["projections"] if is_tree(node) else node,
        trees["matching"]["optimizer"],
        is_leaf=is_tree,
    )
    trees["matching"] = {**trees["matching"]["weights"], "optimizer": moments}
    with CheckpointStore(run, keep=2) as store:
        store.save(6, trees, train_batches(finished.data), to_dict(finished))
    with pytest.raises(UserError) as error:
        train(replace(finished, output=str(run)))
    assert str(error.value).startswith(f"{run}/checkpoints/6/matching ")
    assert str(error.value).endswith(
        f"; another version may have saved it; choose another output, or delete {run} to train again."
    )
    assert latest_step(run) == 6


@pytest.mark.thorough
def test_nothing_of_it_is_exported(finished: RunConfig, tmp_path: Path) -> None:
    checkpoint = Path(finished.output, "checkpoints", "8")
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {
        "params", "optimizer", "matching", "data"
    }  # fmt: skip
    student = load_model(finished.output)  # refuses arrays that the model does not have
    chex.assert_trees_all_equal(student.params(), saved(finished)["params"])
    convert(finished.output, tmp_path / "hf", "huggingface", "float32")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors.keys() == expand(HUGGINGFACE, weight_specs(finished.model)).keys()
    np.testing.assert_array_equal(tensors["model.norm.weight"], student.params()["final_norm"]["scale"])


@pytest.mark.thorough
def test_a_layer_that_the_teacher_lacks_is_refused(
    finished: RunConfig, tmp_path: Path, one_device: None
) -> None:
    distill = replace(finished.distill, match=replace(MATCH, layers=((1, 7),)))
    with pytest.raises(UserError, match="names the teacher's layer 7, but the teacher has 4"):
        train(replace(finished, output=str(tmp_path / "run"), distill=distill))
    assert not (tmp_path / "run" / "config.yaml").exists()
