"""Generation on arrays: pure functions that jitted programs, such as on-policy training steps, can call.

Rows are independent: what a row samples depends on its prompt and its key alone.
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
    """The state of a generation between two tokens.

    Attributes:
        cache: keys and values of all tokens before the newest ones.
        tokens, positions: int32 [B], each row's newest token, which the model has not processed yet, and its position.
        finished: bool [B], whether a stop token has been chosen; a row's tokens after it are to be discarded.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    finished: jax.Array


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A random key for each row [B]; the key of row i is the same whatever the number of rows."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def begin(
    decoder: Decoder,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop: jax.Array,
    cache_size: int,
    choice: TokenChoice,
    revocable: int = 0,
) -> Progress:
    """Runs the prompts and chooses each row's first token.

    Args:
        prompts: int [B, T], right-padded; lengths: [B], at least 1; keys: [B], see `row_keys`.
        stop: ids of the tokens that finish a row, [any number].
        cache_size: at least the length of the longest prompt plus its new tokens.
        revocable: see `Cache.empty`.
    """
    logits, cache = decoder.prefill(prompts, lengths, cache_size, revocable)
    return _choose(logits, cache, lengths, jnp.zeros(lengths.shape, bool), keys, stop, choice)


def advance(
    decoder: Decoder,
    progress: Progress,
    keys: jax.Array,
    stop: jax.Array,
    steps: int | jax.Array,
    max_steps: int,
    choice: TokenChoice,
) -> tuple[Progress, jax.Array]:
    """Chooses `steps` more tokens per row, fewer if all rows finish earlier.

    Args:
        steps: at most `max_steps`, and not static, so that one compiled program serves any number.

    Returns:
        The new state, and int32 [B, max_steps] whose first columns are the chosen tokens.
    """

    def unfinished(carry: tuple[Progress, jax.Array, jax.Array]) -> jax.Array:
        progress, _, step = carry
        return (step < steps) & ~jnp.all(progress.finished)

    def body(carry: tuple[Progress, jax.Array, jax.Array]) -> tuple[Progress, jax.Array, jax.Array]:
        progress, written, step = carry
        logits, cache = decoder.decode(progress.tokens, progress.positions, progress.cache)
        progress = _choose(logits, cache, progress.positions + 1, progress.finished, keys, stop, choice)
        return progress, written.at[:, step].set(progress.tokens), step + 1

    written = jnp.zeros((progress.tokens.shape[0], max_steps), jnp.int32)
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
    """Chooses the tokens at `positions`; their randomness depends on each row's key and position alone."""
    tokens = choice(logits, jax.vmap(jax.random.fold_in)(keys, positions))
    return Progress(cache, tokens, positions, finished | is_stop(tokens, stop))


def is_stop(tokens: jax.Array, stop: jax.Array) -> jax.Array:
    """Whether each token is one of `stop`, [any number]: the shape of `tokens`, bool."""
    return jnp.any(tokens[..., None] == stop, axis=-1)
