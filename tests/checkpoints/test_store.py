"""Checkpoints move between meshes unchanged, are complete or absent, and mismatches are reported."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.checkpoint_metadata import Unreported, read_unreported
from gemma2_jax.checkpoints.store import (
    CheckpointConfig,
    CheckpointStore,
    latest_step,
    load_model,
    restore_params,
)
from gemma2_jax.config import UserError, save_config
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.state import TrainState, Update, initial_state
from tests.parameters import mostly_thorough


def new_state(run: RunConfig, mesh: MeshConfig) -> tuple[TrainState, TrainState]:
    """A state on a mesh over all eight devices, and its abstract twin."""
    built = build_mesh(mesh)
    run = replace(run, seed=3)
    method = build_method(run)
    return initial_state(run, method, built)[0], Update(run, method.specs).abstract_state(built)


def trees(state: TrainState) -> dict[str, Any]:
    return {"params": state.trainable["params"], "optimizer": state.optimizer["params"]}


@pytest.fixture(scope="module")
def saved(
    toy_run: RunConfig, data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainState]:
    """A run folder with checkpoints 1 .. 3 of one state, saved from a 2 x 2 x 2 mesh."""
    folder = tmp_path_factory.mktemp("run")
    state, _ = new_state(toy_run, MeshConfig(2, 2, 2))
    iterator = train_batches(data)
    with CheckpointStore(folder, keep=2) as store:
        for step in (1, 2, 3):
            next(iterator)
            store.save(step, trees(state), iterator, {"seed": 3})
            next(iterator)  # what is saved is where the iterator stood, wherever it goes meanwhile
    save_config(replace(toy_run, output=str(folder)), folder / "config.yaml")
    return folder, state


@mostly_thorough("mesh", [MeshConfig(1, 8, 1), MeshConfig(8, 1, 1), MeshConfig(4, 1, 2)])
def test_restores_bit_equal_on_another_mesh(
    saved: tuple[Path, TrainState], toy_run: RunConfig, data: DataConfig, mesh: MeshConfig
) -> None:
    folder, state = saved
    _, abstract = new_state(toy_run, mesh)
    with CheckpointStore(folder, keep=2) as store:
        restored = store.restore(3, trees(abstract), train_batches(data))
    for found, expected, wanted in zip(
        jax.tree.leaves(restored),
        jax.tree.leaves(trees(state)),
        jax.tree.leaves(trees(abstract)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
    assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, trees(state))


def test_the_iterator_goes_on_where_it_stood(
    saved: tuple[Path, TrainState], toy_run: RunConfig, data: DataConfig
) -> None:
    folder, _ = saved
    _, abstract = new_state(toy_run, MeshConfig(8, 1, 1))
    iterator = train_batches(data)
    with CheckpointStore(folder, keep=2) as store:
        store.restore(3, trees(abstract), iterator)
    uninterrupted = train_batches(data)
    for _ in range(5):
        next(uninterrupted)
    chex.assert_trees_all_equal(next(iterator), next(uninterrupted))


def test_what_is_not_reported_yet(saved: tuple[Path, TrainState], data: DataConfig, tmp_path: Path) -> None:
    _, state = saved
    unreported = Unreported([{"loss": 0.1 + 0.2}, {"loss": 1e-30}], seconds=1 / 3, evaluated=False)
    with CheckpointStore(tmp_path, keep=2) as store:
        store.save(1, trees(state), train_batches(data), {"seed": 3}, unreported)
        store.wait()
        checkpoint = tmp_path / "checkpoints" / "1"
        assert read_unreported(checkpoint) == unreported
        file = checkpoint / "_CHECKPOINT_METADATA"
        metadata = json.loads(file.read_text())
        del metadata["custom_metadata"]["unreported"]  # as of older runs
        file.write_text(json.dumps(metadata))
        assert read_unreported(checkpoint) == Unreported()
        file.write_text("{")
        with pytest.raises(UserError, match=r"/1/_CHECKPOINT_METADATA cannot be read; delete "):
            read_unreported(checkpoint)


def test_only_the_newest_are_kept(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "3"]
    assert latest_step(folder) == 3


@pytest.mark.thorough
def test_no_thread_is_left_of_a_save(toy_run: RunConfig, data: DataConfig, tmp_path: Path) -> None:
    state, _ = new_state(toy_run, MeshConfig(2, 2, 2))
    iterator = train_batches(data)
    next(iterator)
    with CheckpointStore(tmp_path, keep=1) as store:
        counts = []
        for step in (1, 2, 3, 4, 5):
            store.save(step, trees(state), iterator, {})
            store.wait()
            counts.append(threading.active_count())
    assert counts[-1] <= counts[0], threading.enumerate()


def test_pure_nested_dicts_on_disk(saved: tuple[Path, TrainState], toy_run: RunConfig) -> None:
    folder, state = saved
    assert {path.name for path in (folder / "checkpoints" / "3").iterdir() if path.is_dir()} == {
        "params", "optimizer", "data"
    }  # fmt: skip
    assert not list(folder.rglob("*.pkl"))
    loaded = restore_params(
        folder, abstract_params(weight_specs(toy_run.model), mesh=build_mesh(MeshConfig(8, 1, 1)))
    )
    chex.assert_trees_all_equal(loaded, state.trainable["params"])


def test_a_model_in_another_dtype(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    model = load_model(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params())} == {jnp.dtype("bfloat16")}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype("bfloat16"), state.trainable["params"])
    chex.assert_trees_all_equal(model.params(), expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_ff": 80}, r"pairs/global_block/mlp/down of shape \(1, 64, 32\), but .* \(1, 80, 32\)"),
        ({"num_layers": 4}, r"of shape \(1, .* but this configuration has \(2, "),
    ],
)
def test_another_shape(
    saved: tuple[Path, TrainState], toy_run: RunConfig, changes: dict[str, int], named: str
) -> None:
    folder, _ = saved
    config = replace(toy_run.model, **changes)
    with pytest.raises(UserError, match=named):
        restore_params(folder, abstract_params(weight_specs(config), mesh=build_mesh(MeshConfig())))


def test_a_missing_and_a_superfluous_array(saved: tuple[Path, TrainState], toy_run: RunConfig) -> None:
    folder, _ = saved
    target = abstract_params(weight_specs(toy_run.model), mesh=build_mesh(MeshConfig()))
    with pytest.raises(UserError, match="lacks extra of shape"):
        restore_params(folder, {**target, "extra": target["final_norm"]["scale"]})
    del target["final_norm"]
    with pytest.raises(UserError, match="holds final_norm/scale, which this configuration does not have"):
        restore_params(folder, target)


def test_a_half_written_checkpoint_does_not_count(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "run")
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp-0").mkdir()
    assert latest_step(folder) == 3


def test_no_run_folder(tmp_path: Path, toy_config: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_params(tmp_path, abstract_params(weight_specs(toy_config), mesh=build_mesh(MeshConfig())))
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="has no section `model`"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["every", "keep"])
def test_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.{name} is 0"):
        CheckpointConfig(**{"every": 1, "keep": 1, name: 0})


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_grace_that_is_none(seconds: float) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.grace_seconds is .*; it must be a number of seconds"):
        CheckpointConfig(every=1, keep=1, grace_seconds=seconds)


# When one of its reads fails, Orbax does not await the others, whose errors Python then reports by a warning.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine object _read_array:pytest.PytestUnraisableExceptionWarning"
)
def test_a_damaged_checkpoint_is_not_resumed(saved, toy_run, data, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "run"))
    for file in (folder / "checkpoints" / "3" / "params").glob("ocdbt.process_0/d/*"):
        file.write_bytes(file.read_bytes()[:10])
    _, abstract = new_state(toy_run, MeshConfig(1, 8, 1))
    with (
        CheckpointStore(folder, keep=2) as store,
        pytest.raises(UserError, match=r"checkpoints/3 cannot be read as a checkpoint of a run: "),
    ):
        store.restore(3, trees(abstract), train_batches(data))
