"""Log-probabilities of the last tokens of many texts, such as the answers of a multiple-choice task.

Texts are scored in batches sorted by length and padded to few lengths, each of which is compiled once. Only the scored
tokens go through the LM head, a block of them at a time, so an array [tokens, V] never exists. What texts have in
common is computed once: a text that is the beginning of another needs no row of its own (the answers A, B, C and D to
one question share one), and longer answers to one question are branches of it (`model.branches`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.kernels.softcap import negative_log_prob
from gemma2_jax.model.branches import KeysAndValues, branch_hidden
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sampling.sampler import bucket
from gemma2_jax.sharding.layout import batch_shares, on_mesh

_BLOCK_TOKENS = 128  # scored tokens whose logits exist at a time
_LONGEST_BRANCH = 64  # tokens; a branch computes all scores of attention at once


@dataclass(frozen=True)
class ScoredText:
    """A text to score: token ids, of which the last `scored` are scored. The first one is never scored."""

    tokens: list[int]
    scored: int

    @property
    def context(self) -> list[int]:
        """The tokens before the scored ones."""
        return self.tokens[: len(self.tokens) - self.scored]

    @property
    def may_branch(self) -> bool:
        """Whether the scored tokens suit a branch: there are several of them, but few beside the context."""
        return 1 < self.scored <= min(_LONGEST_BRANCH, len(self.tokens) - self.scored)


@dataclass(frozen=True)
class Score:
    """The score of a window.

    Attributes:
        log_prob: natural log-probability of its scored tokens, their sum.
        is_greedy: whether each of them was the most likely token.
    """

    log_prob: float
    is_greedy: bool


def continuation_window(context: Sequence[int], continuation: Sequence[int], max_length: int) -> ScoredText:
    """Returns the window that scores a continuation.

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
    return ScoredText([*kept, *continuation], len(continuation))


def rolling_windows(tokens: Sequence[int], bos: int, max_length: int) -> list[ScoredText]:
    """Returns windows that together score each token of a text once.

    Each window begins with the beginning-of-text id, without which Gemma's predictions are poor. The first one scores
    `max_length` tokens; each later one repeats the token before those that it scores, and the last one is as long as
    the others, so that its few tokens have the most context.

    Args:
        max_length: number of tokens that the model processes at a time, at least 2.
    """
    windows = [ScoredText([bos, *tokens[:max_length]], min(len(tokens), max_length))]
    end = max_length
    while end < len(tokens):
        start, end = end, min(end + max_length - 1, len(tokens))
        windows.append(ScoredText([bos, *tokens[end - max_length : end]], end - start))
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
        self, windows: Sequence[ScoredText], show: Callable[[int], None] = lambda done: None
    ) -> list[Score]:
        """Returns the score of each window, in the order of `windows`.

        Args:
            show: called with the number of windows that are scored, after each batch.

        Raises:
            UserError: the model's log-probabilities are NaN.
        """
        found: list[Score | None] = [None] * len(windows)
        done = 0
        for rows in _batches(windows, self._batch_size):
            batch = _Batch(windows, rows, self._batch_size)
            log_probs, is_greedy = self._run(batch)
            for index, span in batch.spans.items():
                found[index] = Score(
                    float(log_probs[span].sum(dtype=np.float64)), bool(is_greedy[span].all())
                )
            done += len(batch.spans)
            show(done)
        return [score for score in found if score is not None]

    def _run(self, batch: "_Batch") -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probabilities of the batch's scored tokens, and whether each is the most likely one."""
        count = len(batch.targets)
        scored = np.zeros((2, batch.tokens.size + batch.branches.size), np.int32)
        scored[:, :count] = batch.places, batch.targets
        rows = batch.tokens, batch.branches, batch.branch_rows, batch.branch_starts
        placed = rows if self._mesh is None else tuple(on_mesh(x, self._mesh) if x.size else x for x in rows)
        log_probs, is_greedy = jax.device_get(
            scores_of_tokens(self._model, *placed, scored[0], scored[1], np.int32(count), self._compute)
        )
        if np.isnan(log_probs[:count]).any():
            raise UserError(
                "The model's log-probabilities are NaN; its weights hold NaN or infinite numbers, or are too large for "
                "the dtype that it computes in."
            )
        return log_probs[:count], is_greedy[:count]


@dataclass
class _Row:
    """Token ids that the model processes, and the windows scored with them, by index.

    Attributes:
        whole: windows whose tokens, but for the last, are the beginning of `inputs`.
        branching: windows whose context is the beginning of `inputs`, and whose answer is a branch of it.
    """

    inputs: list[int]
    whole: list[int] = field(default_factory=list)
    branching: list[int] = field(default_factory=list)


def _rows(windows: Sequence[ScoredText]) -> list[_Row]:
    """Returns rows for all windows, the longest first."""
    asked = Counter(tuple(window.context) for window in windows if window.may_branch)
    inputs = [
        window.context if window.may_branch and asked[tuple(window.context)] > 1 else window.tokens[:-1]
        for window in windows
    ]
    rows: list[_Row] = []
    scored = 0  # tokens scored in the newest row; at most one per position has a place in a batch's arrays
    # In this order, a list comes directly before those that it is the beginning of, so go backwards.
    for index in sorted(range(len(windows)), key=lambda index: inputs[index], reverse=True):
        window = windows[index]
        branches = len(inputs[index]) < len(window.tokens) - 1
        new = 1 if branches else window.scored
        scored += new
        begins_newest = bool(rows) and rows[-1].inputs[: len(inputs[index])] == inputs[index]
        if not begins_newest or scored > len(rows[-1].inputs):
            rows.append(_Row(inputs[index]))
            scored = new
        (rows[-1].branching if branches else rows[-1].whole).append(index)
    return sorted(rows, key=lambda row: len(row.inputs), reverse=True)


def _batches(windows: Sequence[ScoredText], batch_size: int) -> Iterator[list[_Row]]:
    rows = _rows(windows)
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]


class _Batch:
    """The arrays of a batch of rows.

    Attributes:
        tokens: int32 [B, T].
        branches: int32 [A, S], the answers that are branches, without their last tokens; [0, 0] if there are none.
        branch_rows, branch_starts: int32 [A], as in `branch_hidden`.
        places, targets: the index of each scored token's predecessor among the tokens of rows and branches, and its id.
        spans: the part of `places` that belongs to each window, by its index.
    """

    def __init__(self, windows: Sequence[ScoredText], rows: Sequence[_Row], batch_size: int) -> None:
        T = bucket(max(len(row.inputs) for row in rows))
        self.tokens = np.zeros((batch_size, T), np.int32)
        longest = max((windows[index].scored - 1 for row in rows for index in row.branching), default=0)
        S = bucket(longest) if longest else 0
        answers: list[Sequence[int]] = []
        branch_rows: list[int] = []
        branch_starts: list[int] = []
        self.places: list[int] = []
        self.targets: list[int] = []
        self.spans: dict[int, slice] = {}
        for number, row in enumerate(rows):
            self.tokens[number, : len(row.inputs)] = row.inputs
            for index in row.whole:
                last = len(windows[index].tokens) - 1
                self._add(
                    index, windows[index], range(number * T + last - windows[index].scored, number * T + last)
                )
            for index in row.branching:
                window = windows[index]
                start = len(window.context)
                first = batch_size * T + len(answers) * S
                self._add(index, window, [number * T + start - 1, *range(first, first + window.scored - 1)])
                answers.append(window.tokens[start:-1])
                branch_rows.append(number)
                branch_starts.append(start)
        A = batch_size * _power_of_two(-(-len(answers) // batch_size)) if answers else 0
        self.branches = np.zeros((A, S), np.int32)
        self.branch_rows, self.branch_starts = np.zeros((2, A), np.int32)
        for number, answer in enumerate(answers):
            self.branches[number, : len(answer)] = answer
        self.branch_rows[: len(answers)] = branch_rows
        self.branch_starts[: len(answers)] = branch_starts

    def _add(self, index: int, window: ScoredText, places: Sequence[int]) -> None:
        self.spans[index] = slice(len(self.places), len(self.places) + window.scored)
        self.places += places
        self.targets += window.tokens[len(window.tokens) - window.scored :]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@partial(jax.jit, static_argnames="compute")
def scores_of_tokens(
    model: Gemma2,
    tokens: jax.Array,
    branches: jax.Array,
    branch_rows: jax.Array,
    branch_starts: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    compute: ComputeConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns each target's log-probability, and whether it is the most likely token: [R]; zeros after `count` targets.

    Args:
        tokens: [B, T]; branches: [A, S]; branch_rows, branch_starts: [A], as in `branch_hidden`.
        places, targets: [R], indices into the B * T tokens followed by the A * S ones, and the ids that follow these.
    """
    collector = KeysAndValues() if branches.size else None
    hidden, kept = model.collect(collector, tokens, compute=compute)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if branches.size:
        tails = branch_hidden(model, kept, branches, branch_rows, branch_starts, compute)
        flat = jnp.concatenate([flat, tails.reshape(-1, hidden.shape[-1])])
    (R,) = targets.shape
    block = min(_BLOCK_TOKENS, R)
    padded = -(-R // block) * block
    places, targets = (jnp.pad(x, (0, padded - R)) for x in (places, targets))

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
    return log_probs[:R], is_greedy[:R]
