"""What matching a teacher of another width adds to the train state: the projections, and an optimizer of theirs.

    {"projections": [M, D, E], "optimizer": its state}

M pairs of layers, the student's width D, the teacher's E. It is a tree of its own in a checkpoint, which nothing reads
but a run that goes on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma2_jax.distill.matching import PROJECTIONS
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import init_weight
from gemma2_jax.sharding.layout import weight_sharding
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.optimizer import build_projection_optimizer
from gemma2_jax.training.state import abstract_optimizer

_PATH = "matching/projections"


def abstract_matching(config: RunConfig, teacher: Gemma2 | None, mesh: Mesh) -> dict[str, Any] | None:
    """Its shapes, dtypes and shardings, or None for a run without projections.

    Raises:
        UserError: the mesh does not divide the student's width.
    """
    match = config.distill.match
    if match is None or teacher is None:
        return None
    sizes = match.projection_sizes(config.model, teacher.config)
    if sizes is None:
        return None
    projections = jax.ShapeDtypeStruct(
        tuple(sizes[d] for d in PROJECTIONS.dims),
        jnp.float32,
        sharding=weight_sharding(mesh, _PATH, PROJECTIONS.dims, sizes),
    )
    optimizer = build_projection_optimizer(config.optimizer, config.training.steps)
    return {
        "projections": projections,
        "optimizer": abstract_optimizer(optimizer, projections, mesh),
    }


def init_matching(config: RunConfig, abstract: dict[str, Any]) -> dict[str, Any]:
    """New projections, drawn from the run's seed as weights of the model are."""
    optimizer = build_projection_optimizer(config.optimizer, config.training.steps)
    sizes = dict(zip(PROJECTIONS.dims, abstract["projections"].shape, strict=True))

    def init(key: jax.Array) -> dict[str, Any]:
        projections = init_weight(key, _PATH, PROJECTIONS, sizes)
        return {"projections": projections, "optimizer": optimizer.init(projections)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state: dict[str, Any] = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
    return state


def update_matching(
    config: RunConfig, matching: dict[str, Any] | None, gradient: jax.Array | None
) -> dict[str, Any] | None:
    """One optimizer step of the projections, by their gradient."""
    if matching is None:
        return None
    optimizer = build_projection_optimizer(config.optimizer, config.training.steps)
    projections = matching["projections"]
    updates, optimizer_state = optimizer.update(gradient, matching["optimizer"], projections)
    return {"projections": optax.apply_updates(projections, updates), "optimizer": optimizer_state}
