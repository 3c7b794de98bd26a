"""Generation on arrays: pure functions that a jitted program can call, such as training on own samples.

Rows do not know of each other: what a row samples depends on its prompt and its key alone.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from gemma2_jax.model.cache import Cache
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.sampling.choice import TokenChoice


@partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "tokens", "positions", "finished"], meta_fields=[]
)
@dataclass(frozen=True)
class Progress:
    """Where a generation stands between two tokens.

    Attributes:
        cache: what has been read.
        tokens, positions: int32 [B], each row's newest token, chosen but not yet read, and its position.
        finished: bool [B], a stop token has been chosen; what a row gives after it is to be thrown away.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    finished: jax.Array


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A random key for each row [B]; row i's is the same whatever the number of rows."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def begin(
    decoder: Decoder,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop: jax.Array,
    cache_size: int,
    choice: TokenChoice,
) -> Progress:
    """Read the prompts and choose each row's first token.

    Args:
        prompts: int [B, T], right-padded; lengths: [B], at least 1; keys: [B], see `row_keys`.
        stop: ids [any number] that finish a row.
        cache_size: at least the longest prompt and its new tokens together.
    """
    logits, cache = decoder.prefill(prompts, lengths, cache_size)
    return _choose(logits, cache, lengths, jnp.zeros(lengths.shape, bool), keys, stop, choice)


def advance(
    decoder: Decoder,
    progress: Progress,
    keys: jax.Array,
    stop: jax.Array,
    steps: int | jax.Array,
    room: int,
    choice: TokenChoice,
) -> tuple[Progress, jax.Array]:
    """Choose `steps` more tokens a row, fewer if all rows finish before.

    Args:
        steps: at most `room`, and not static, so that one compiled program serves any number.

    Returns:
        The new state, and int32 [B, room] whose first columns are the chosen tokens.
    """

    def unfinished(carry: tuple[Progress, jax.Array, jax.Array]) -> jax.Array:
        progress, _, step = carry
        return (step < steps) & ~jnp.all(progress.finished)

    def body(carry: tuple[Progress, jax.Array, jax.Array]) -> tuple[Progress, jax.Array, jax.Array]:
        progress, written, step = carry
        logits, cache = decoder.decode(progress.tokens, progress.positions, progress.cache)
        progress = _choose(logits, cache, progress.positions + 1, progress.finished, keys, stop, choice)
        return progress, written.at[:, step].set(progress.tokens), step + 1

    written = jnp.zeros((progress.tokens.shape[0], room), jnp.int32)
    progress, written, _ = jax.lax.while_loop(unfinished, body, (progress, written, jnp.int32(0)))
    return progress, written


def _choose(
    logits: jax.Array,
    cache: Cache,
    positions: jax.Array,
    finished: jax.Array,
    keys: jax.Array,
    stop: jax.Array,
    choice: TokenChoice,
) -> Progress:
    """The token at `positions`; its randomness is the row's key and the position, nothing else."""
    tokens = choice(logits, jax.vmap(jax.random.fold_in)(keys, positions))
    return Progress(cache, tokens, positions, finished | _is_stop(tokens, stop))


def _is_stop(tokens: jax.Array, stop: jax.Array) -> jax.Array:
    return jnp.any(tokens[..., None] == stop, axis=-1)
