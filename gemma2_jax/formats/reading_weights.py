"""Reads the weights of an open checkpoint onto devices, one weight of one layer at a time."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma2_jax.config import UserError
from gemma2_jax.formats.source import WeightSource, all_places
from gemma2_jax.model.narrowing import check_range
from gemma2_jax.model.quantised import is_quantised, storage_of, stored
from gemma2_jax.model.weights import Params, specs_by_path, weight_specs


def read_onto_devices(source: WeightSource, target: Any, progress: Callable[[int, int], None]) -> Params:
    """Returns the weights of a checkpoint as the arrays, or quantised weights, that `target` describes.

    Args:
        target: abstract parameters with shardings, laid out like `weight_specs`.
        progress: called with the number of weights read and the total number.

    Raises:
        UserError: a weight has numbers beyond what its dtype or format can hold.
    """
    params: Params = {}
    specs = weight_specs(source.config)
    letters, places = specs_by_path(specs), list(all_places(specs))
    for done, place in enumerate(places, 1):
        leaf, branch, name = _find(target, params, place.path)
        part = source.weight(place)
        _check_part(part, leaf, f"{source.path}: {place.path}")
        shardings, dims = jax.tree.map(lambda array: array.sharding, leaf), letters[place.path].dims
        whole = shardings.codes if is_quantised(leaf) else shardings
        if place.pair is None:
            branch[name] = _converter(storage_of(leaf), dims, shardings)(put(part, whole))
        else:
            if name not in branch:
                branch[name] = _zeros(leaf, shardings)
            sharding = NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:]))
            write = _setter(storage_of(leaf), dims[1:], shardings)
            branch[name] = write(branch[name], put(part, sharding), place.pair)
        progress(done, len(places))
    return params


def _check_part(part: np.ndarray, leaf: Any, name: str) -> None:
    """Raises UserError if numbers of a weight are beyond what its dtype or format can hold."""
    if not is_quantised(leaf):
        check_range(part, leaf.dtype, name)
    elif leaf.format.overflows(part):
        raise UserError(
            f"{name} has values beyond what the scales of {leaf.format.name} can hold; choose another "
            "format: adaptation.base=nf4, or int8 of a model that is not trained."
        )


def _find(target: Any, params: Params, path: str) -> tuple[Any, Params, str]:
    """Returns the leaf of `target` at `path`, and its parent dict (created if missing) and key in `params`."""
    *above, name = path.split("/")
    for key in above:
        target, params = target[key], params.setdefault(key, {})
    return target[name], params, name


def put(part: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a host array on devices; each process provides the parts of its own devices."""
    return jax.make_array_from_callback(part.shape, sharding, lambda index: np.ascontiguousarray(part[index]))


def _zeros(leaf: Any, shardings: Any) -> Any:
    """Zeros for an abstract array, or for all parts of an abstract quantised weight."""
    return jax.jit(
        lambda: jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), leaf), out_shardings=shardings
    )()


@cache
def _converter(kind: Any, dims: str, shardings: Any) -> Any:
    """Returns a function from an array to the weight in a dtype or `Format`; arguments as in `_setter`."""
    return jax.jit(lambda array: stored(array, dims, kind), out_shardings=shardings)


@cache
def _setter(kind: Any, dims: str, shardings: Any) -> Any:
    """Returns a function that writes one pair's weight into a stack, in place.

    Args:
        kind: dtype or `Format` of the stack; dims: letters of the pair's weight; shardings: those of the stack.
    """

    def write(stack: Any, part: jax.Array, pair: jax.Array) -> Any:
        return jax.tree.map(
            lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, pair, 0),
            stack,
            stored(part, dims, kind),
        )

    return jax.jit(write, donate_argnums=0, out_shardings=shardings)
