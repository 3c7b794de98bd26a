"""A fingerprint of the weights of a teacher on the devices, to detect that a run's teacher has changed."""

import hashlib
import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import to_dict
from gemma2_jax.model.transformer import Gemma2


def fingerprint(model: Gemma2) -> str:
    """A digest of a model's configuration and weights, in hexadecimal.

    It does not depend on the mesh or on the padding of the vocabulary, but on the dtype. It takes one pass over the
    weights on the devices, which is fast enough for every start of a run; `teacher_identity`, which identifies the
    teacher of a cache, reads the checkpoint instead.
    """
    tokens = model.config.num_tokens
    config = to_dict(replace(model.config, vocab_size=tokens, vocab_padding=0))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, weight in jax.tree.leaves_with_path(model.params()):
        is_embedding = path[-1].key == "embedding"
        for found in _mixed_sums(weight, tokens if is_embedding else len(weight)):
            digest.update(np.asarray(found).tobytes())
    return digest.hexdigest()


@partial(jax.jit, static_argnames="rows")
def _mixed_sums(weight: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums, over the first `rows` rows of a weight, of two hashes of each number's bits and position: uint32 scalars.

    Integer sums do not depend on the order of addition, and so not on the mesh.
    """
    width = 8 * weight.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(weight, f"uint{width}").astype(jnp.uint32)
    place = jnp.zeros(weight.shape, jnp.uint32)
    for axis in range(weight.ndim):
        stride = math.prod(weight.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, weight.shape, axis) * jnp.uint32(stride)
    mixed = bits ^ place * jnp.uint32(0x9E3779B9)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):  # MurmurHash3's finaliser
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    mixed ^= mixed >> 16
    mixed = jnp.where(jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0) < rows, mixed, 0)
    return jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (mixed | 1), dtype=jnp.uint32)
