"""Which letter of an array's dimensions lies along which mesh axis: the one table of the package.

Weights split their model width over `fsdp`; activations split their batch over it instead, so each
kind of array has its own column. Letters that no row names are never split.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gemma2_jax.config import UserError

MeshAxes = str | tuple[str, ...]
Tree = TypeVar("Tree")

WEIGHT_AXES: Mapping[str, MeshAxes] = {
    "D": "fsdp",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
ACTIVATION_AXES: Mapping[str, MeshAxes] = {
    "B": ("data", "fsdp"),
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def weight_spec(dims: str) -> PartitionSpec:
    """How a weight with these dimensions rests in memory between its uses."""
    return PartitionSpec(*(WEIGHT_AXES.get(d) for d in dims))


def weight_sharding(mesh: Mesh, path: str, dims: str, sizes: Mapping[str, int]) -> NamedSharding:
    """`weight_spec` on a mesh.

    Raises:
        UserError: a mesh axis does not divide the size of a dimension laid along it.
    """
    for d in dims:
        axis = WEIGHT_AXES.get(d)
        if axis is not None and sizes[d] % mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis} is {mesh.shape[axis]}, which does not divide dimension {d} ({sizes[d]}) of the "
                f"model's {path}; choose a divisor of {sizes[d]}."
            )
    return NamedSharding(mesh, weight_spec(dims))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch [B, ...] is split over devices."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["B"]))


def on_mesh(rows: Tree, mesh: Mesh) -> Tree:
    """This process's rows of some arrays [B, ...], such as a batch's, as its part of global ones over the mesh."""
    sharding = batch_sharding(mesh)
    placed: Tree = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
    return placed


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Fix how an activation (or a weight gathered for use) is laid out; without a mesh, do nothing.

    `dims` names x's axes by letter: `constrain(queries, "BTNH")`.
    """
    return _lay_out(x, PartitionSpec(*(ACTIVATION_AXES.get(d) for d in dims)))


def batch_shares(mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many devices split the batch, on `mesh` or else on the mesh in context; 1 without any."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape.get(axis, 1) for axis in ACTIVATION_AXES["B"])


def is_split(dimension: str) -> bool:
    """Whether weights have this dimension split over devices, on the mesh in context."""
    axes = WEIGHT_AXES[dimension]
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes)) > 1


def constrain_weight(x: jax.Array, dims: str) -> jax.Array:
    """Fix that a gradient lies as its weight does; without a mesh, do nothing."""
    return _lay_out(x, weight_spec(dims))


def _lay_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
