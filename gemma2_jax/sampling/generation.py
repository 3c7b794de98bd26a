"""One batch of prompts being continued, by compiled programs: token by token, or with a draft."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import numpy as np

from gemma2_jax.model.decoder import Decoder
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.decoding import advance, begin
from gemma2_jax.sampling.speculative import Models, advance_speculation, begin_speculation

MAX_STEPS = 64  # steps that one dispatch can run

_begin = jax.jit(begin, static_argnames=("cache_size", "choice"))
_advance = jax.jit(advance, static_argnames=("max_steps", "choice"), donate_argnames="progress")
_begin_speculation = jax.jit(begin_speculation, static_argnames=("cache_size", "choice"))
_advance_speculation = jax.jit(
    advance_speculation, static_argnames=("max_passes", "choice"), donate_argnames="progress"
)


@dataclass
class DraftStatistics:
    """What has become of a draft's tokens.

    Attributes:
        tested: number of proposed tokens that were accepted or rejected; accepted: number of those accepted.
        passes: number of passes of the model, without those over prompts; tokens: number of tokens that they gave.
            Both add up over the rows of a batch.
    """

    tested: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float | None:
        """The fraction of tested tokens that were accepted; None without any."""
        return self.accepted / self.tested if self.tested else None

    @property
    def tokens_per_pass(self) -> float | None:
        """The mean number of tokens of a row's pass, at most the proposed ones and one more; None without any."""
        return self.tokens / self.passes if self.passes else None


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to continue.

    Attributes:
        prompts: int32 [B, T], right-padded; lengths: int32 [B].
        keys: random keys [B]; stop: int32 [any number], ids of the tokens that finish a row.
        max_new_tokens: new tokens per row.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    keys: jax.Array
    stop: jax.Array
    max_new_tokens: int
    choice: TokenChoice

    @property
    def positions(self) -> int:
        """The number of positions of padded prompts and their new tokens."""
        return self.prompts.shape[1] + self.max_new_tokens


class Generation(ABC):
    """The generation of a batch's new tokens."""

    @abstractmethod
    def first(self) -> list[list[int]]:
        """Runs the prompts; returns the first token of each row."""

    @abstractmethod
    def more(self, steps: int) -> list[list[int]]:
        """Runs `steps` steps, at most MAX_STEPS; returns the next tokens of each row, which end at its stop token.

        Tokens of a finished row are to be ignored. A step gives every other row at least one token.
        """


class Plain(Generation):
    """Each step is one token of each row."""

    def __init__(self, decoder: Decoder, batch: PromptBatch, cache_size: int) -> None:
        self._decoder, self._batch, self._size = decoder, batch, cache_size

    def first(self) -> list[list[int]]:
        batch = self._batch
        self._progress = _begin(
            self._decoder,
            batch.prompts,
            batch.lengths,
            batch.keys,
            batch.stop,
            cache_size=self._size,
            choice=batch.choice,
        )
        return np.asarray(self._progress.tokens)[:, None].tolist()

    def more(self, steps: int) -> list[list[int]]:
        batch = self._batch
        self._progress, written = _advance(
            self._decoder,
            self._progress,
            batch.keys,
            batch.stop,
            steps=np.int32(steps),
            max_steps=MAX_STEPS,
            choice=batch.choice,
        )
        stop = set(np.asarray(batch.stop).tolist())
        return [_until_stop(row, stop) for row in np.asarray(written)[:, :steps].tolist()]


class Speculative(Generation):
    """Each step is one pass of the target, over the tokens that a draft proposes.

    Args:
        statistics: gets what becomes of them.
    """

    def __init__(
        self, models: Models, batch: PromptBatch, cache_size: int, statistics: DraftStatistics
    ) -> None:
        self._models, self._batch, self._size = models, batch, cache_size
        self._limits = (batch.lengths + batch.max_new_tokens - 1).astype(np.int32)
        self._statistics = statistics

    def first(self) -> list[list[int]]:
        batch = self._batch
        self._progress = _begin_speculation(
            self._models,
            batch.prompts,
            batch.lengths,
            batch.keys,
            batch.stop,
            self._limits,
            cache_size=self._size,
            choice=batch.choice,
        )
        return np.asarray(self._progress.tokens)[:, 1:].tolist()

    def more(self, steps: int) -> list[list[int]]:
        batch = self._batch
        self._progress, passes = _advance_speculation(
            self._models,
            self._progress,
            batch.keys,
            batch.stop,
            self._limits,
            passes=np.int32(steps),
            max_passes=MAX_STEPS,
            choice=batch.choice,
        )
        done = jax.device_get(passes)
        self._statistics.tested += int(done.tested.sum())
        self._statistics.accepted += int(done.accepted.sum())
        self._statistics.passes += int((done.kept > 0).sum())
        self._statistics.tokens += int(done.kept.sum())
        is_kept = np.arange(done.tokens.shape[2]) < done.kept[..., None]
        return [row[kept].tolist() for row, kept in zip(done.tokens, is_kept, strict=True)]


def _until_stop(ids: list[int], stop: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in stop), len(ids))
    return ids[: end + 1]
