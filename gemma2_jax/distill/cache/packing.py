"""Entries to bytes and back: one record a row of the data.

A record is the crc32 of the row that it belongs to, then streams of unsigned integers, each cut into planes of
one byte (all lowest bytes, all second ones, ...), each plane a zstd frame behind its length:

    numbers   how many entries each token has; left out where all have as many
    gaps      of the ids of a token, sorted: the first id, then each one's distance to the one before
    weights   number of draws less 1, or a logarithm as its place on a grid
    tails     the same grid, one a token; its lowest number stands for none

Zstd's Huffman code finds what bit packing would have to be told: high bytes are mostly alike, low ones are
stored as they are, and most ids are drawn once.
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
from gemma2_jax.kernels.lm_head import SparseTargets
from gemma2_jax.kernels.softcap import NEVER
from gemma2_jax.model.config import ModelConfig

_LEVEL = 3  # of zstd
_LENGTH = struct.Struct("<I")


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
        self._widths = {
            "numbers": _width(draws),
            "gaps": _width(num_tokens - 1),
            "draws": _width(draws - 1),
            "logs": _width((1 << grid.bits) - 1),
        }
        self._log_shares = np.log(np.arange(1, draws + 1) / draws).astype(np.float32)
        self._logs = grid.logs()

    def pack(self, entries: Entries, checksum: int) -> Packed:
        """The record of one row, from entries [T, N] of numpy arrays."""
        config, ids = self._config, entries.ids
        first = ids < self._num_tokens  # of the draws of an id
        first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
        numbers = first.sum(axis=1)
        places = np.flatnonzero(first)
        frames: list[bytes] = []

        def add(stream: str, values: np.ndarray) -> None:
            frames.extend(_compressed(values, self._widths[stream]))

        if self._number is None:
            add("numbers", numbers)
        if config.kind != "full":
            found = ids.reshape(-1)[places]
            gaps = np.diff(found, prepend=0)
            begin = (np.cumsum(numbers) - numbers)[numbers > 0]
            gaps[begin] = found[begin]
            add("gaps", gaps)
        if config.kind == "sampled":
            add("draws", np.diff(places, append=ids.size) - 1)
        if not config.counted:
            add("logs", self._grid.codes(entries.logs.reshape(-1)[places]))
        if config.has_tail:
            add("logs", self._grid.codes(entries.log_tail))
        parts = [_LENGTH.pack(checksum), *(_LENGTH.pack(len(frame)) + frame for frame in frames)]
        return Packed(b"".join(parts), int(numbers.max()))

    def unpack(self, records: Sequence[bytes], largest: int) -> tuple[SparseTargets, list[int]]:
        """The entries of B records as numpy arrays, K = `largest`, and the checksums of the rows that they belong to.

        Raises:
            UserError: a record is not whole.
        """
        try:
            checksums = [_LENGTH.unpack_from(record)[0] for record in records]
            return self._unpack(_Streams(records, self._widths), len(records), largest), checksums
        except (struct.error, zstandard.ZstdError, ValueError, IndexError):
            raise UserError(
                "A record of distill.cache is not as it was written; `gemma2 teacher-cache --verify` tells which file "
                "it is in."
            ) from None

    def _unpack(self, streams: "_Streams", B: int, K: int) -> SparseTargets:
        config, T = self._config, self._seq_len
        numbers = np.full(B * T, self._number or 0)
        if self._number is None:
            numbers = streams.take("numbers").astype(np.int64)
        if numbers.size != B * T or numbers.max() > K:
            raise ValueError
        starts = np.cumsum(numbers) - numbers
        if config.kind == "full":
            found = np.tile(np.arange(self._num_tokens, dtype=np.int32), B * T)
        else:
            sums = np.cumsum(streams.take("gaps"), dtype=np.int64)
            before = np.where(starts > 0, sums[starts - 1], 0)
            found = (sums - np.repeat(before, numbers)).astype(np.int32)
        logs = np.zeros(len(found), np.float32)
        if config.kind == "sampled":
            logs += self._log_shares[streams.take("draws")]
        if not config.counted:
            logs += self._logs[streams.take("logs")]
        ids, log_weights = np.zeros((B, T, K), np.int32), np.full((B, T, K), NEVER, np.float32)
        places = np.arange(len(found)) + np.repeat(np.arange(B * T) * K - starts, numbers)
        ids.reshape(-1)[places] = found
        log_weights.reshape(-1)[places] = logs
        tail = np.zeros((B, T), np.float32)
        if config.has_tail:
            codes = streams.take("logs").reshape(B, T)
            tail = np.where(codes > 0, np.exp(self._logs[codes]), 0)  # nothing is left, or as good as nothing
        sparse = SparseTargets(ids, log_weights, tail)
        return sparse if config.kind == "sampled" else _normalised(sparse)


class _Streams:
    """Takes one stream after another, each of all rows."""

    def __init__(self, records: Sequence[bytes], widths: dict[str, int]) -> None:
        self._rows = [_frames(record) for record in records]
        self._widths, self._next = widths, 0
        self._decompressor = zstandard.ZstdDecompressor()

    def take(self, stream: str) -> np.ndarray:
        values: np.ndarray = self._plane()
        for number in range(1, self._widths[stream]):
            values = values | self._plane().astype(np.int32) << 8 * number
        return values

    def _plane(self) -> np.ndarray:
        plane = b"".join(self._decompressor.decompress(row[self._next]) for row in self._rows)
        self._next += 1
        return np.frombuffer(plane, np.uint8)


def _normalised(sparse: SparseTargets) -> SparseTargets:
    """Weights and tail with a sum of 1."""
    total = np.exp(sparse.log_weights).sum(axis=-1) + sparse.tail
    return SparseTargets(sparse.ids, sparse.log_weights - np.log(total)[..., None], sparse.tail / total)


def _width(largest: int) -> int:
    """The bytes that hold a number."""
    return max(1, (largest.bit_length() + 7) // 8)


def _compressed(values: np.ndarray, width: int) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    planes = ((values >> 8 * number & 0xFF).astype(np.uint8) for number in range(width))
    return [compressor.compress(plane.tobytes()) for plane in planes]


def _frames(record: bytes) -> list[bytes]:
    frames, at = [], _LENGTH.size
    while at < len(record):
        (length,) = _LENGTH.unpack_from(record, at)
        at += _LENGTH.size
        frames.append(record[at : at + length])
        at += length
    return frames
