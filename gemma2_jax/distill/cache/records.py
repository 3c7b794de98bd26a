"""Entries to bytes and back: one record a row of the data.

A record is the crc32 of the row that it belongs to, then streams of unsigned integers (`integer_streams`):

    numbers   how many entries each token has; left out where all have as many
    gaps      of the ids of a token, sorted: the first id and 1, then each one's distance to the one before
    draws     how often each id was drawn, less 1
    logs      a logarithm as its place on a grid
    tails     the same grid, one a token; its lowest number stands for none
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.distill.cache.encoding import EncodingConfig, Entries
from gemma2_jax.distill.cache.integer_streams import StreamsReader, StreamsWriter, bytes_for
from gemma2_jax.kernels.softcap import NEVER
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.objectives.targets import SparseTargets

_CHUNK = 2048  # tokens that are unpacked at a time: what is in use stays in a processor's own memory


@dataclass(frozen=True)
class LogGrid:
    """Logarithms in [low, high] as one of 2^bits numbers.

    A logarithm is off by `step` / 2 at most. Where there is a tail, weights and tail are brought to a sum of 1
    when they are read, which moves all of them by as much again at most: `step` in all.
    """

    low: float
    high: float
    bits: int

    @property
    def step(self) -> float:
        return (self.high - self.low) / ((1 << self.bits) - 1)

    def codes(self, logs: np.ndarray) -> np.ndarray:
        """Float to uint16, the nearest; what lies outside, at the end."""
        scaled = (np.clip(logs, self.low, self.high) - self.low) / self.step
        return np.round(scaled).astype(np.uint16)

    def logs(self) -> np.ndarray:
        """Every number's logarithm, float32."""
        return (self.low + self.step * np.arange(1 << self.bits)).astype(np.float32)


def log_grid(config: EncodingConfig, model: ModelConfig) -> LogGrid:
    """The range that the soft cap leaves for log p, or for log p/q where there is a proposal.

    Logits lie within the cap, so log p >= -2 cap / temperature - log V. With q = p^(1/t) / Z and
    1 <= Z <= V^(1 - 1/t), log p/q = (1 - 1/t) log p + log Z.
    """
    log_tokens = math.log(model.num_tokens)
    lowest = -2 * model.final_logit_softcap / config.temperature - log_tokens
    flattening = 1 - 1 / config.proposal_temperature
    if config.kind == "sampled":
        return LogGrid(flattening * lowest, flattening * log_tokens, config.weight_bits)
    return LogGrid(lowest, 0.0, config.weight_bits)


@dataclass(frozen=True)
class Packed:
    """One record, and the largest number of entries that one of its tokens has."""

    record: bytes
    largest: int


def broken_record() -> UserError:
    """What is said of a record that is not whole."""
    return UserError("distill.cache holds a damaged record; `gemma2 teacher-cache --verify` names its file.")


def row_checksums(batch: Batch) -> list[int]:
    """The crc32 of each row of a batch: of its tokens and of the documents that they belong to."""
    rows = zip(batch.tokens, batch.segment_ids, strict=True)
    return [zlib.crc32(segments.tobytes(), zlib.crc32(tokens.tobytes())) for tokens, segments in rows]


class Packer:
    """Packs and unpacks the records of one cache.

    Args:
        config: how its entries were made.
        grid: of their logarithms.
        num_tokens: V, which stands for no id.
        seq_len: T.
    """

    def __init__(self, config: EncodingConfig, grid: LogGrid, num_tokens: int, seq_len: int) -> None:
        self._config, self._grid, self._num_tokens, self._seq_len = config, grid, num_tokens, seq_len
        # As many for every token, or None.
        self._number = {"full": num_tokens, "top_k": config.entries}.get(config.kind)
        draws = config.entries or 1
        self._of_numbers, self._of_draws = bytes_for(draws), bytes_for(draws - 1)
        self._of_logs = bytes_for((1 << grid.bits) - 1)
        self._log_shares = np.log(np.arange(1, draws + 1) / draws).astype(np.float32)
        self._logs = grid.logs()

    def pack(self, entries: Entries, checksum: int) -> Packed:
        """The record of one row, from entries [T, N] of numpy arrays.

        Raises:
            UserError: the teacher gave no numbers.
        """
        config, ids = self._config, entries.ids
        if ids.min() < 0:
            raise UserError(
                "distill.teacher gives NaN for some tokens; set distill.dtype=float32, or, if it is that already, "
                "another teacher: its weights are damaged."
            )
        first = ids < self._num_tokens  # of the draws of an id
        first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
        numbers = first.sum(axis=1)
        places = np.flatnonzero(first)
        writer = StreamsWriter(checksum)
        if self._number is None:
            writer.planes(numbers, self._of_numbers)
        if config.kind != "full":
            found = ids.reshape(-1)[places]
            gaps = np.diff(found, prepend=0)
            begin = (np.cumsum(numbers) - numbers)[numbers > 0]
            gaps[begin] = found[begin] + 1
            writer.scales(gaps)
        if config.kind == "sampled":
            writer.small(np.diff(places, append=ids.size) - 1, self._of_draws)
        if not config.counted:
            writer.planes(self._grid.codes(entries.logs.reshape(-1)[places]), self._of_logs)
        if config.has_tail:
            writer.planes(self._grid.codes(entries.log_tail), self._of_logs)
        return Packed(writer.record(), int(numbers.max()))

    def unpack(self, records: Sequence[bytes], largest: int) -> tuple[SparseTargets, list[int]]:
        """The entries of B records as numpy arrays, K = `largest`, and the checksums of the rows that they belong to.

        Raises:
            UserError: a record is not whole.
        """
        B, T, K = len(records), self._seq_len, largest
        sparse = SparseTargets(
            np.zeros((B, T, K), np.int32), np.full((B, T, K), NEVER, np.float32), np.zeros((B, T), np.float32)
        )
        checksums = []
        rows = max(1, _CHUNK // T)
        for first in range(0, B, rows):
            chunk = slice(first, first + rows)
            part = SparseTargets(sparse.ids[chunk], sparse.log_weights[chunk], sparse.tail[chunk])
            checksums += self._unpack(records[chunk], part)
        return sparse, checksums

    def _unpack(self, records: Sequence[bytes], sparse: SparseTargets) -> list[int]:
        """Fills in the entries, and gives the checksums."""
        try:
            reader = StreamsReader(records)
            self._fill(reader, sparse)
            return reader.checksums
        except (struct.error, zstandard.ZstdError, ValueError, IndexError):
            raise broken_record() from None

    def _fill(self, reader: StreamsReader, sparse: SparseTargets) -> None:
        config = self._config
        B, T, K = sparse.ids.shape
        numbers = np.full(B * T, self._number or 0)
        if self._number is None:
            numbers = reader.planes(self._of_numbers)
        if numbers.size != B * T or numbers.max() > K:
            raise ValueError
        used = np.arange(K) < numbers.reshape(B, T, 1)
        each = numbers.reshape(B, T).sum(axis=1)
        if config.kind == "full":
            sparse.ids[...] = np.arange(K)
        else:
            gaps, found = reader.scales()
            if np.any(found != each):
                raise ValueError
            sparse.ids[used] = _from_gaps(gaps, numbers)
        logs: np.ndarray | None = None
        if config.kind == "sampled":
            logs = self._log_shares.take(reader.small(each, self._of_draws))
        if not config.counted:
            codes = self._logs.take(reader.planes(self._of_logs))
            logs = codes if logs is None else logs + codes
        sparse.log_weights[used] = logs
        if config.has_tail:
            codes = reader.planes(self._of_logs).reshape(B, T)
            # The lowest: nothing is left, or as good as nothing.
            sparse.tail[...] = np.where(codes > 0, np.exp(self._logs.take(codes)), 0)
        if config.kind != "sampled":
            _normalise(sparse)


def _from_gaps(gaps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Ids int32 [n] of gaps int32 [n], so `numbers` [tokens] of them each."""
    sums = np.cumsum(gaps, dtype=np.int32)  # may run over, which the difference takes back
    ends = np.cumsum(numbers[:-1], dtype=np.int64)
    before = np.zeros(len(numbers), np.int32)
    before[1:] = np.where(ends > 0, sums[ends - 1], 0)
    return sums - np.repeat(before + 1, numbers)


def _normalise(sparse: SparseTargets) -> None:
    """Brings weights and tail to a sum of 1."""
    total = np.exp(sparse.log_weights).sum(axis=-1) + sparse.tail
    sparse.log_weights[...] -= np.log(total)[..., None]
    sparse.tail[...] /= total
