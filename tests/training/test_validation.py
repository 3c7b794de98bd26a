"""Validation: one synchronisation, after the last batch."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.validation import averages, sum_over


def test_numbers_are_fetched_once_and_after_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    fetched_after: list[int] = []
    device_get = jax.device_get

    def batches() -> Iterator[Batch]:
        for number in range(1, 6):
            ids = np.full((8, 4), number, np.int32)
            given.append(number)
            yield Batch(ids, ids, ids, ids, np.ones((8, 4), np.float32))

    def step(batch: Batch) -> dict[str, jax.Array]:
        return {"cross_entropy": jnp.sum(batch.tokens * 0.25), "targets": jnp.sum(batch.loss_mask)}

    def fetch(values: object) -> object:
        fetched_after.append(len(given))
        return device_get(values)

    monkeypatch.setattr(jax, "device_get", fetch)
    mesh: Mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    with jax.set_mesh(mesh):
        metrics = averages(sum_over(step, batches(), mesh))
    assert fetched_after == [5]
    assert metrics["targets"] == 5 * 8 * 4
    assert metrics["cross_entropy"] == pytest.approx(0.25 * 3)


def test_arrays_are_summed_to_lists() -> None:
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    ids = np.ones((8, 4), np.int32)
    batches = [Batch(ids, ids, ids, ids, np.ones((8, 4), np.float32))] * 3
    with jax.set_mesh(mesh):
        found = sum_over(lambda batch: {"a": jnp.sum(batch.tokens), "b": jnp.arange(4.0)}, batches, mesh)
    assert found == {"a": 96.0, "b": [0.0, 3.0, 6.0, 9.0]}
