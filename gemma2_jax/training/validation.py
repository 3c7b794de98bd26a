"""Metrics of a model over the whole validation split."""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.layout import batch_sharding
from gemma2_jax.training.metrics import perplexity


def on_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch, as its part of one global batch split over the mesh."""
    sharding = batch_sharding(mesh)
    placed: Batch = jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
    return placed


def validate(
    step: Wrapped, model: Gemma2, teacher: Gemma2 | None, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
    """Averages over every target of `batches`: `loss` and `cross_entropy` (nats), `perplexity`, and against a
    teacher `kl` and `agreement`; and `tokens`, the number of targets.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in step(model, teacher, on_mesh(batch, mesh)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop("tokens")
    averages = {name: total / tokens for name, total in totals.items()}
    averages["loss"] = averages["cross_entropy"]
    averages["perplexity"] = perplexity(averages["cross_entropy"])
    return averages | {"tokens": tokens}
