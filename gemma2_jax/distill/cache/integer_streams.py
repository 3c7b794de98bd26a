"""Streams of unsigned integers to bytes and back, close to their entropy, by operations on whole arrays.

A record is a checksum, then frames, each behind its length. There are three ways to make frames of a stream:

    planes    numbers of a fixed width: all lowest bytes, all second ones, ..., each through zstd
    scales    numbers from 1 whose size varies: each one's bit length through zstd, and what follows its leading 1
              bit by bit. What is left is as good as random, and takes what it has to (Elias's gamma code, with the
              first half of it squeezed)
    small     numbers that are mostly 0, 1 or 2: four to a byte, 3 standing for 3 and more, through zstd, then what
              each of those is above 3. A byte each would take a bit each, however seldom it is not 0

Of zstd it is the Huffman code that is wanted. Matches that it finds among such numbers by chance mostly cost more than
they save: its level is the lowest that weighs both, and still packs faster than any teacher speaks.
"""

import struct
from collections.abc import Sequence

import numpy as np
import zstandard

_LENGTH = struct.Struct("<I")
_WEIGHING = zstandard.ZstdCompressionParameters.from_level(16)
_PLACES = np.array([1, 4, 16, 64], np.uint8)  # of the four in a byte
# The four of each byte, as an integer to have them taken at once.
_FOURS = np.ascontiguousarray(np.arange(256)[:, None] // _PLACES % 4, np.uint8).view(np.uint32).reshape(-1)
_MOST = 3  # that one of four can be
_WINDOW = 4  # bytes that a number lies within, wherever it begins
_BITS = 8 * (_WINDOW - 1) + 1  # behind its leading 1, at most
_ONES = np.left_shift(1, np.arange(_BITS + 1), dtype=np.int32)  # the leading 1 before so many


def bytes_for(largest: int) -> int:
    """The bytes that hold a number."""
    return max(1, (largest.bit_length() + 7) // 8)


class StreamsWriter:
    """Puts one record together; streams are read in the order in which they were added."""

    def __init__(self, checksum: int) -> None:
        self._parts = [_LENGTH.pack(checksum)]
        self._compressor = zstandard.ZstdCompressor(compression_params=_WEIGHING)

    def planes(self, values: np.ndarray, width: int) -> None:
        """Adds integers [n] below 256^width."""
        for number in range(width):
            self._squeezed(values >> 8 * number & 0xFF)

    def scales(self, values: np.ndarray) -> None:
        """Adds integers [n] from 1 and below 2^26."""
        lengths = np.frexp(values)[1] - 1  # of what follows the leading 1
        self._squeezed(lengths)
        ends = np.cumsum(lengths)
        at = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        bits = (np.repeat(values, lengths) >> at & 1).astype(np.uint8)
        self._frame(np.packbits(bits, bitorder="little").tobytes())

    def small(self, values: np.ndarray, width: int) -> None:
        """Adds integers [n] below 256^width."""
        fours = np.zeros((-(-len(values) // 4), 4), np.uint8)
        fours.reshape(-1)[: len(values)] = np.minimum(values, _MOST)
        self._squeezed(fours @ _PLACES)
        self.planes(values[values >= _MOST] - _MOST, width)

    def record(self) -> bytes:
        return b"".join(self._parts)

    def _squeezed(self, values: np.ndarray) -> None:
        self._frame(self._compressor.compress(values.astype(np.uint8).tobytes()))

    def _frame(self, frame: bytes) -> None:
        self._parts += [_LENGTH.pack(len(frame)), frame]


class StreamsReader:
    """Takes one stream after another, each of all records at once.

    Raises, also from its methods:
        ValueError, IndexError, struct.error, zstandard.ZstdError: a record is not whole.
    """

    def __init__(self, records: Sequence[bytes]) -> None:
        self.checksums = [_LENGTH.unpack_from(record)[0] for record in records]
        self._frames = [_split(record) for record in records]
        self._next = 0
        self._decompressor = zstandard.ZstdDecompressor()

    def planes(self, width: int) -> np.ndarray:
        """Integers [n of all records]."""
        values: np.ndarray = np.concatenate(self._squeezed())
        for number in range(1, width):
            values = values | np.concatenate(self._squeezed()).astype(np.int32) << 8 * number
        return values

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [n of all records], and how many there are of each record."""
        parts, frames = self._squeezed(), self._taken()
        lengths = np.concatenate(parts)
        if lengths.max(initial=0) > _BITS:
            raise ValueError("a number is too long")
        counts = np.array([len(part) for part in parts])
        ends = np.cumsum(lengths.astype(np.int64))  # in bits
        taken = np.diff(np.concatenate([[0], ends])[np.cumsum(counts)], prepend=0)  # by each record
        sizes = np.array([len(frame) for frame in frames])
        if np.any(sizes != -(-taken // 8)):
            raise ValueError("there are more or fewer bits than numbers")
        skipped = np.cumsum(8 * sizes - taken) - (8 * sizes - taken)  # at the ends of the frames before
        begin = ends - lengths + np.repeat(skipped, counts)
        joined = b"".join(frames) + bytes(_WINDOW)
        windows = np.ndarray(len(joined) - _WINDOW + 1, "<u4", joined, strides=(1,))  # from each byte on
        found = np.ascontiguousarray(windows).take(begin >> 3).astype(np.uint32, copy=False)
        found >>= (begin & 7).astype(np.uint32)
        ones = _ONES.take(lengths)
        return found.view(np.int32) & (ones - 1) | ones, counts

    def small(self, numbers: Sequence[int], width: int) -> np.ndarray:
        """Integers [n of all records], of which each record has so many."""
        parts = zip(self._squeezed(), numbers, strict=True)
        values = np.concatenate([_FOURS.take(part).view(np.uint8)[:number] for part, number in parts])
        above = self.planes(width)
        at = np.flatnonzero(values == _MOST)
        values = values.astype(np.promote_types(values.dtype, above.dtype), copy=False)
        values[at] += above
        return values

    def _squeezed(self) -> list[np.ndarray]:
        return [np.frombuffer(self._decompressor.decompress(frame), np.uint8) for frame in self._taken()]

    def _taken(self) -> list[bytes]:
        self._next += 1
        return [frames[self._next - 1] for frames in self._frames]


def _split(record: bytes) -> list[bytes]:
    """The frames of a record."""
    frames, at = [], _LENGTH.size
    while at < len(record):
        (length,) = _LENGTH.unpack_from(record, at)
        at += _LENGTH.size
        if at + length > len(record):
            raise ValueError("a frame is cut")
        frames.append(record[at : at + length])
        at += length
    return frames
