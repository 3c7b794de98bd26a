"""Log-probabilities of the last tokens of many texts, such as the answers of a multiple-choice task.

Texts are scored in batches sorted by length and padded to few lengths, each of which is compiled once. Only the scored
tokens go through the LM head, a block of them at a time, so that [tokens, V] never exists; and texts that are the
beginning of another share its forward pass, as the answers A, B, C and D after one question do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.kernels.softcap import negative_log_prob
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sampling.sampler import bucket
from gemma2_jax.sharding.layout import batch_shares, on_mesh

_BLOCK_TOKENS = 128  # scored tokens whose logits exist at a time


@dataclass(frozen=True)
class Window:
    """A text to score: token ids, of which the last `scored` are scored. The first one is never scored."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Score:
    """The log-probability of a window's scored tokens, and whether each of them was the most likely token."""

    log_prob: float
    is_greedy: bool


def continuation_window(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Window:
    """The window that scores a continuation.

    Args:
        context: ids that begin with the beginning-of-text id. If the model's context has no room for all of them, those
            after the first are left out.
        max_length: the model's context: number of tokens that it processes.

    Raises:
        UserError: the continuation alone has more tokens than the context.
    """
    if len(continuation) > max_length:
        raise UserError(
            f"an answer has {len(continuation)} tokens, but the context only {max_length}; give a larger context"
        )
    room = max_length + 1 - len(continuation)
    kept = [*context[:1], *context[1:][max(0, len(context) - room) :]] if len(context) > room else context
    return Window([*kept, *continuation], len(continuation))


def rolling_windows(tokens: Sequence[int], bos: int, max_length: int) -> list[Window]:
    """Windows that together score each token of a text once.

    Each window begins with the beginning-of-text id, without which Gemma's predictions are useless. The first one
    scores `max_length` tokens; each later one repeats the token before those that it scores, and the last one is as
    long as the others, so that its few tokens have the most context.

    Args:
        max_length: number of tokens that the model processes at a time, at least 2.
    """
    windows = [Window([bos, *tokens[:max_length]], min(len(tokens), max_length))]
    end = max_length
    while end < len(tokens):
        start, end = end, min(end + max_length - 1, len(tokens))
        windows.append(Window([bos, *tokens[end - max_length : end]], end - start))
    return windows


class ContinuationScorer:
    """Scores windows with a model.

    Args:
        batch_size: rows that are computed at a time.
        mesh: the mesh that the model's weights are on, for a batch that is split over it; None for one device.
    """

    def __init__(
        self, model: Gemma2, compute: ComputeConfig, batch_size: int, mesh: Mesh | None = None
    ) -> None:
        self._model, self._compute, self._mesh = model, compute, mesh
        shares = 1 if mesh is None else batch_shares(mesh)
        self._batch_size = -(-batch_size // shares) * shares

    def score(
        self, windows: Sequence[Window], show: Callable[[int], None] = lambda done: None
    ) -> list[Score]:
        """The score of each window.

        Args:
            show: called with the number of windows that are scored, after each batch.

        Raises:
            UserError: the model's log-probabilities are NaN.
        """
        found: list[Score | None] = [None] * len(windows)
        done = 0
        for batch in _batches(windows, self._batch_size):
            log_probs, is_greedy = self._run(windows, batch)
            start = 0
            for index in (index for row in batch for index in row.members):
                span = slice(start, start + windows[index].scored)
                found[index] = Score(
                    float(log_probs[span].sum(dtype=np.float64)), bool(is_greedy[span].all())
                )
                start = span.stop
                done += 1
            show(done)
        return [score for score in found if score is not None]

    def _run(self, windows: Sequence[Window], batch: "Sequence[_Row]") -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and greediness of the scored tokens of a batch's windows, one after another."""
        T = bucket(max(len(row.inputs) for row in batch))
        tokens = np.zeros((self._batch_size, T), np.int32)
        places: list[np.ndarray] = []
        targets: list[int] = []
        for number, row in enumerate(batch):
            tokens[number, : len(row.inputs)] = row.inputs
            for window in (windows[index] for index in row.members):
                last = len(window.tokens) - 1
                places.append(number * T + np.arange(last - window.scored, last))
                targets += window.tokens[last + 1 - window.scored :]
        scored = np.zeros((2, tokens.size), np.int32)
        scored[0, : len(targets)] = np.concatenate([*places, []])
        scored[1, : len(targets)] = targets
        placed = tokens if self._mesh is None else on_mesh(tokens, self._mesh)
        log_probs, is_greedy = jax.device_get(
            scores_of_tokens(self._model, placed, scored[0], scored[1], np.int32(len(targets)), self._compute)
        )
        if np.isnan(log_probs[: len(targets)]).any():
            raise UserError(
                "The model's log-probabilities are NaN; its weights hold NaN or infinite numbers, or are too large for "
                "the dtype that it computes in."
            )
        return log_probs[: len(targets)], is_greedy[: len(targets)]


@dataclass
class _Row:
    """Token ids that the model processes, and the indices of the windows that are scored with them."""

    inputs: list[int]
    members: list[int]


def _rows(windows: Sequence[Window]) -> list[_Row]:
    """Rows for all windows, the longest first. A window whose tokens begin another's has no row of its own."""
    rows: list[_Row] = []
    scored = 0  # tokens of the newest row's windows; at most one per position has a place in a batch's arrays
    # In this order, a list comes directly before those that it is the beginning of, so go backwards.
    for index in sorted(range(len(windows)), key=lambda index: windows[index].tokens[:-1], reverse=True):
        inputs = windows[index].tokens[:-1]
        scored += windows[index].scored
        if rows and rows[-1].inputs[: len(inputs)] == inputs and scored <= len(rows[-1].inputs):
            rows[-1].members.append(index)
        else:
            rows.append(_Row(inputs, [index]))
            scored = windows[index].scored
    return sorted(rows, key=lambda row: len(row.inputs), reverse=True)


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[_Row]]:
    rows = _rows(windows)
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]


@partial(jax.jit, static_argnames="compute")
def scores_of_tokens(
    model: Gemma2,
    tokens: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the most likely token, both [S]; zeros after `count` targets.

    Args:
        tokens: [B, T]; places, targets: [S], indices into the B * T tokens, and the ids that follow these.
    """
    hidden = model.hidden(tokens, compute=compute)
    flat = hidden.reshape(-1, hidden.shape[-1])
    (S,) = targets.shape
    block = min(_BLOCK_TOKENS, S)
    padded = -(-S // block) * block
    places, targets = (jnp.pad(x, (0, padded - S)) for x in (places, targets))

    def body(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = number * block
        place, target = (jax.lax.dynamic_slice(x, (start,), (block,)) for x in (places, targets))
        logits = model.embedder.decode(flat[place][:, None])[:, 0]
        new = -negative_log_prob(logits, target), jnp.argmax(logits, axis=-1) == target
        log_probs, is_greedy = (
            jax.lax.dynamic_update_slice(x, values, (start,)) for x, values in zip(found, new, strict=True)
        )
        return log_probs, is_greedy

    zeros = jnp.zeros(padded, jnp.float32), jnp.zeros(padded, bool)
    log_probs, is_greedy = jax.lax.fori_loop(0, -(-count // block), body, zeros)
    return log_probs[:S], is_greedy[:S]
