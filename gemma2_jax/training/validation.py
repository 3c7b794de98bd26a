"""Metrics of a model over validation batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.metrics import perplexity

# Batches dispatched ahead of the one being computed; all batches at once could fill the devices' memory.
_AHEAD = 2


def sum_over(step: Callable[[Batch], Any], batches: Iterable[Batch], mesh: Mesh) -> Any:
    """Sums the outputs of `step` over the batches: a pytree of floats, and of nested lists where outputs are arrays."""
    sums: list[Any] = []
    for batch in batches:
        sums.append(step(on_mesh(batch, mesh)))
        if len(sums) > _AHEAD:
            jax.block_until_ready(sums[-1 - _AHEAD])
    # Fetched only once: the devices would be idle while the numbers of each batch are fetched.
    return jax.tree.map(_total, *jax.device_get(sums))


def _total(*each: Any) -> Any:
    total: Any = sum(np.asarray(value, np.float64) for value in each)
    return total.tolist()


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Averages of all metrics over the targets, and `targets`, the number of targets.

    A method on text reports `cross_entropy` (nats) and `entropy`, to which `perplexity` is added; with a teacher also
    `kl`, `agreement`, `acceptance` and `teacher_entropy`.

    Args:
        sums: sums of a method's metrics over the targets, and `targets`.
    """
    targets = sums["targets"]
    found = {name: total / targets for name, total in sums.items() if name != "targets"}
    if "cross_entropy" in found:
        found["perplexity"] = perplexity(found["cross_entropy"])
    return found | {"targets": targets}
