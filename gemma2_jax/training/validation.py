"""Metrics of a model over validation batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.metrics import perplexity

# Batches that wait on the devices behind the one in work; all of them at once could fill their memory.
_AHEAD = 2


def sum_over(step: Callable[[Batch], Any], batches: Iterable[Batch], mesh: Mesh) -> Any:
    """Sums of what a step gives of each batch: a pytree of floats."""
    sums: list[Any] = []
    for batch in batches:
        sums.append(step(on_mesh(batch, mesh)))
        if len(sums) > _AHEAD:
            jax.block_until_ready(sums[-1 - _AHEAD])
    # Fetched once: the devices would stand idle while the numbers of each batch are fetched.
    return jax.tree.map(lambda *each: sum(map(float, each)), *jax.device_get(sums))


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Averages over every target: `cross_entropy` (nats), `perplexity`, `entropy`, and against a teacher `kl`,
    `agreement` and `teacher_entropy`; and `targets`, their number.

    Args:
        sums: of these, and `targets`.
    """
    targets = sums["targets"]
    found = {name: total / targets for name, total in sums.items() if name != "targets"}
    found["perplexity"] = perplexity(found["cross_entropy"])
    return found | {"targets": targets}
