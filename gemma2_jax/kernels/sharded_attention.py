"""Attention on each device's part of the arrays: its rows, its heads, its queries, and all keys of these."""

import math
from collections.abc import Callable
from typing import Any

import jax

from gemma2_jax.config import UserError
from gemma2_jax.sharding.layout import key_in_use, layout_in_use, model_in_use

# (tables, query [B, T, N, H], key, value [B, S, K, H], query_segments [B, T], key_segments [B, S]) -> [B, T, N, H]
Attend = Callable[..., jax.Array]


def on_each_device(
    attend: Attend,
    tables: Any,
    tables_spec: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Runs `attend` under `jax.shard_map`, with the activations of the layout in use on the mesh in context.

    The compiler cannot split a kernel that it cannot see into. Where a sequence is split over devices, so are its
    queries; keys and values are gathered, and their gradients summed.

    Args:
        tables: first argument of `attend`; tables_spec: its partition specs.
        query: [B, T, N, H]; key, value: [B, T, K, H]; segment_ids: [B, T].

    Raises:
        UserError: a device would hold queries of other heads than its keys.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(tables, query, key, value, segment_ids, segment_ids)
    _check_heads(query.shape[2], key.shape[2])
    spec = layout_in_use().spec
    keys = spec("BSKH")  # S is never split
    in_specs = (tables_spec, spec("BTNH"), keys, keys, spec("BT"), spec("BS"))
    # Pallas kernels do not declare over which axes their results vary.
    shared = jax.shard_map(attend, in_specs=in_specs, out_specs=spec("BTNH"), check_vma=False)
    return shared(tables, query, key, value, segment_ids, segment_ids)


def _check_heads(N: int, K: int) -> None:
    axes = {letter: layout_in_use().activations.get(letter, ()) for letter in "NK"}
    mesh = jax.sharding.get_abstract_mesh().shape
    shares = math.prod(mesh[axis] for axis in axes["N"])
    if axes["N"] != axes["K"] and shares > 1:
        raise UserError(
            f"{key_in_use()}.activations lays N along {_axis_names(axes['N'])} and K along {_axis_names(axes['K'])}, "
            "but a device needs the keys of its own queries' heads; give both the same axes, or choose "
            "compute.attention.kernel=reference."
        )
    if K % shares:
        raise UserError(
            f"{' x '.join(f'mesh.{axis}' for axis in axes['K'])} is {shares}, which does not divide the {K} "
            f"key/value heads of {model_in_use()}, and a device needs whole heads; choose a divisor, or "
            "compute.attention.kernel=reference."
        )


def _axis_names(axes: tuple[str, ...]) -> str:
    return " and ".join(axes) or "no axis"
