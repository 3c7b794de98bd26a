"""Metrics of a model over the whole validation split."""

from collections.abc import Iterable

from jax.sharding import Mesh
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.metrics import perplexity


def validate(
    step: Wrapped, model: Gemma2, teacher: Gemma2 | None, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
    """Averages over every target of `batches`: `cross_entropy` (nats), `perplexity`, `entropy`, and against a teacher
    `kl`, `agreement` and `teacher_entropy`; and `targets`, their number.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in step(model, teacher, on_mesh(batch, mesh)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop("tokens")
    averages = {name: total / tokens for name, total in totals.items()}
    averages["perplexity"] = perplexity(averages["cross_entropy"])
    return averages | {"targets": tokens}
