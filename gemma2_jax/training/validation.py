"""Metrics of a model over validation batches."""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.metrics import perplexity

_AHEAD = (
    2  # batches that wait on the devices behind the one in work; all of them at once could fill their memory
)


def validate(
    step: Wrapped, model: Gemma2, teacher: Gemma2 | None, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
    """Averages over every target of `batches`: `cross_entropy` (nats), `perplexity`, `entropy`, and against a teacher
    `kl`, `agreement` and `teacher_entropy`; and `targets`, their number.
    """
    sums: list[dict[str, jax.Array]] = []
    for batch in batches:
        sums.append(step(model, teacher, on_mesh(batch, mesh)))
        if len(sums) > _AHEAD:
            jax.block_until_ready(sums[-1 - _AHEAD])
    fetched = jax.device_get(
        sums
    )  # Once: the devices would stand idle while the numbers of each batch are read.
    totals = {name: sum(float(of_batch[name]) for of_batch in fetched) for name in fetched[0]}
    tokens = totals.pop("tokens")
    averages = {name: total / tokens for name, total in totals.items()}
    averages["perplexity"] = perplexity(averages["cross_entropy"])
    return averages | {"targets": tokens}
