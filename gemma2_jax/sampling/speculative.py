"""Speculative decoding on arrays: a smaller draft model proposes tokens, which the target verifies in one pass.

In each pass, the draft samples some tokens one after another. The target computes its distributions after all of them
at once, and a rejection test keeps the first few. The first rejected token is drawn again, from the part of the
target's distribution that exceeds the draft's; if none is rejected, one more token is drawn from the target. The text's
distribution is exactly the target's, whatever the draft is (Leviathan et al., arXiv 2211.17192, section 2 and appendix
A.1). Temperature, top-k and top-p apply to both distributions before the test, so it is the target's distribution under
these settings. At temperature 0, tokens are those of the target alone, except where rounding decides between two.

Rows are independent, as in `decoding`: a row's randomness depends on its key and on positions alone. A later pass that
proposes at the same position again uses the same random numbers. That is sound, since whether it is reached depends on
the numbers of earlier positions only.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import NEVER
from gemma2_jax.model.cache import Cache
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.sampling.choice import TokenChoice, largest
from gemma2_jax.sampling.decoding import begin, is_stop


@partial(jax.tree_util.register_dataclass, data_fields=["target", "draft"], meta_fields=["draft_tokens"])
@dataclass(frozen=True)
class Models:
    """The target, its draft, and the number of tokens that the draft proposes in each pass."""

    target: Decoder
    draft: Decoder
    draft_tokens: int


@partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "kept", "accepted", "tested"], meta_fields=[]
)
@dataclass(frozen=True)
class Passes:
    """What passes of the target have given.

    Attributes:
        tokens: int32 [B, passes, draft_tokens + 1].
        kept: int32 [B, passes], how many of each pass's tokens are the row's; 0 once it has finished.
        accepted, tested: int32 [B, passes], how many proposed tokens were accepted, and how many accepted or rejected.
            Those after a rejected token or a row's end do not count.
    """

    tokens: jax.Array
    kept: jax.Array
    accepted: jax.Array
    tested: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["target", "draft", "tokens", "positions", "finished"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Speculation:
    """The state of a generation between two passes.

    Attributes:
        target: cache of the target, with all tokens before the newest ones.
        draft: cache of the draft, with all tokens before the last two.
        tokens: int32 [B, 2], each row's last two tokens; positions: int32 [B], that of the newest.
        finished: bool [B], whether a row has chosen a stop token or has its maximum length.
    """

    target: Cache
    draft: Cache
    tokens: jax.Array
    positions: jax.Array
    finished: jax.Array


def begin_speculation(
    models: Models,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop: jax.Array,
    limits: jax.Array,
    cache_size: int,
    choice: TokenChoice,
) -> Speculation:
    """Runs the prompts through both models and chooses each row's first token, as `decoding.begin` does.

    Args:
        limits: int32 [B], the position of each row's last token if no stop token ends it earlier.
        cache_size: at least the length of the longest prompt plus its new tokens plus `draft_tokens`.
    """
    revocable = models.draft_tokens
    first = begin(models.target, prompts, lengths, keys, stop, cache_size, choice, revocable)
    _, draft = models.draft.prefill(prompts, lengths, cache_size, revocable)
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    return Speculation(
        target=first.cache,
        draft=draft,
        tokens=jnp.concatenate([last, first.tokens[:, None]], axis=1),
        positions=first.positions,
        finished=first.finished | (first.positions >= limits),
    )


def advance_speculation(
    models: Models,
    progress: Speculation,
    keys: jax.Array,
    stop: jax.Array,
    limits: jax.Array,
    passes: int | jax.Array,
    max_passes: int,
    choice: TokenChoice,
) -> tuple[Speculation, Passes]:
    """Runs `passes` passes, fewer if all rows finish earlier; other arguments as in `begin_speculation`.

    Args:
        passes: at most `max_passes`, and not static, so that one compiled program serves any number.
    """

    def unfinished(carry: tuple[Speculation, Passes, jax.Array]) -> jax.Array:
        progress, _, number = carry
        return (number < passes) & ~jnp.all(progress.finished)

    def body(carry: tuple[Speculation, Passes, jax.Array]) -> tuple[Speculation, Passes, jax.Array]:
        progress, done, number = carry
        progress, *each = _pass(models, progress, keys, stop, limits, choice)
        fields = (done.tokens, done.kept, done.accepted, done.tested)
        written = (field.at[:, number].set(new) for field, new in zip(fields, each, strict=True))
        return progress, Passes(*written), number + 1

    rows = progress.positions.shape[0]
    none = jnp.zeros((rows, max_passes), jnp.int32)
    tokens = jnp.zeros((rows, max_passes, models.draft_tokens + 1), jnp.int32)
    carry = (progress, Passes(tokens, none, none, none), jnp.int32(0))
    progress, done, _ = jax.lax.while_loop(unfinished, body, carry)
    return progress, done


def _pass(
    models: Models,
    progress: Speculation,
    keys: jax.Array,
    stop: jax.Array,
    limits: jax.Array,
    choice: TokenChoice,
) -> tuple[Speculation, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One pass; returns the new state, and one pass's part of the fields of `Passes`."""
    g = models.draft_tokens
    index = jnp.arange(g + 1)
    places = progress.positions[:, None] + 1 + index
    place_keys = jax.vmap(lambda key, row: jax.vmap(partial(jax.random.fold_in, key))(row))(keys, places)
    proposed, draft_logits, draft = _propose(models, progress, place_keys, choice)
    hidden, target = models.target.extend(
        jnp.concatenate([progress.tokens[:, 1:], proposed], axis=1), progress.positions, progress.target
    )
    logits = models.target.logits(hidden)
    accepted, drawn = rejection_test(choice, logits, draft_logits, proposed, place_keys)

    new = jnp.where(index < accepted[:, None], jnp.pad(proposed, ((0, 0), (0, 1))), drawn[:, None])
    ends = (is_stop(new, stop) | (places >= limits[:, None])) & (index <= accepted[:, None])
    ended = jnp.any(ends, axis=1)
    kept = jnp.where(progress.finished, 0, 1 + jnp.where(ended, jnp.argmax(ends, axis=1), accepted))
    last = kept[:, None] + jnp.arange(2)  # the last two of the two tokens before the pass and its own
    progress = Speculation(
        target=target,
        draft=draft,
        tokens=jnp.take_along_axis(jnp.concatenate([progress.tokens, new], axis=1), last, axis=1),
        positions=progress.positions + kept,
        finished=progress.finished | ended,
    )
    tested = jnp.minimum(accepted + 1, g)
    return progress, new, kept, jnp.minimum(accepted, kept), jnp.minimum(tested, kept)


def _propose(
    models: Models, progress: Speculation, keys: jax.Array, choice: TokenChoice
) -> tuple[jax.Array, jax.Array, Cache]:
    """The draft's tokens [B, draft_tokens], its logits [B, draft_tokens, V] with V of the target, and its cache.

    It runs the last two tokens again, since after a pass without rejections it has not run the last but one.

    Args:
        keys: [B, draft_tokens + 1], for the positions after the newest token.
    """
    V = models.target.config.vocab_size

    def choose(logits: jax.Array, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        logits = _with_rows(logits, V)
        return choice(logits, keys[:, number]), logits

    def body(
        carry: tuple[jax.Array, Cache], number: jax.Array
    ) -> tuple[tuple[jax.Array, Cache], tuple[jax.Array, jax.Array]]:
        tokens, cache = carry
        logits, cache = models.draft.decode(tokens, progress.positions + number, cache)
        tokens, logits = choose(logits, number)
        return (tokens, cache), (tokens, logits)

    hidden, cache = models.draft.extend(progress.tokens, progress.positions - 1, progress.draft)
    first, first_logits = choose(models.draft.logits(hidden[:, 1:])[:, 0], 0)
    (_, cache), (tokens, logits) = jax.lax.scan(body, (first, cache), jnp.arange(1, models.draft_tokens))
    return (
        jnp.concatenate([first[:, None], tokens.T], axis=1),
        jnp.concatenate([first_logits[:, None], logits.swapaxes(0, 1)], axis=1),
        cache,
    )


def rejection_test(
    choice: TokenChoice, logits: jax.Array, draft_logits: jax.Array, proposed: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rejection test of g proposed tokens per row.

    Args:
        logits: the target's, float32 [B, g + 1, V]; draft_logits: float32 [B, g, V].
        proposed: int32 [B, g]; keys: random keys [B, g + 1] of the positions, with which the draft has sampled.

    Returns:
        How many proposed tokens are accepted before the first rejection, [B]; and the token after those, [B]: V, which
        is not a token, where logits are NaN.
    """
    g = proposed.shape[1]
    if choice.temperature == 0:
        best = largest(logits)
        accepted = _leading(proposed == best[:, :g])
        return accepted, _at(best, accepted)
    p, q = (jax.nn.softmax(choice.distribution(each), axis=-1) for each in (logits, draft_logits))
    of_proposed = [jnp.take_along_axis(each, proposed[..., None], axis=-1)[..., 0] for each in (p[:, :g], q)]
    test_keys, draw_keys = (jax.vmap(jax.vmap(partial(_fold_in, number)))(keys) for number in (1, 2))
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(test_keys[:, :g])
    accepted = _leading(uniform < acceptance_probability(*of_proposed))
    # After g accepted tokens there is no proposal to correct, and the draft's share is 0.
    left = residual(_at(p, accepted), _at(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), accepted))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, left.shape[1:]))(_at(draw_keys, accepted))
    return accepted, largest(jnp.log(left) + noise)


def acceptance_probability(p: jax.Array, q: jax.Array) -> jax.Array:
    """min(1, P / Q): the probability of keeping a token that the target gives probability P, and the draft Q."""
    return jnp.minimum(1.0, p / q)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """max(P - Q, 0) [..., V], unnormalised: the distribution of the token that replaces a rejected one.

    Where rounding leaves nothing, P and Q are equal, and it is P.
    """
    left = jnp.maximum(p - q, 0.0)
    return jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), left, p)


def _leading(kept: jax.Array) -> jax.Array:
    """How many entries of each row are true before the first false one: bool [B, g] to int32 [B]."""
    return jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] for each row b."""
    return x[jnp.arange(x.shape[0]), index]


def _fold_in(number: int, key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, number)


def _with_rows(logits: jax.Array, rows: int) -> jax.Array:
    """Logits [B, V] with `rows` entries, which differ from V by padding of the vocabulary only."""
    kept = logits[:, :rows]
    return jnp.pad(kept, ((0, 0), (0, rows - kept.shape[1])), constant_values=NEVER)
