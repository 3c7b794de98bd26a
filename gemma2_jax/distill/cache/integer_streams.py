"""Compresses streams of unsigned integers to nearly their entropy, with operations on whole arrays.

A record is a checksum followed by frames, each preceded by its length. A stream is written in one of three ways:

    planes    integers of a fixed width: all lowest bytes, then all second bytes, ..., each compressed with zstd
    scales    integers from 1 on of widely varying size: their bit lengths, compressed with zstd, then the bits after
              each leading 1, which are close to random and stored as they are (Elias's gamma code, with its first
              half compressed)
    small     integers that are mostly 0, 1 or 2: four per byte, with 3 for all from 3 on, compressed with zstd; then
              the excess over 3 of those. With a byte each, zstd could not store them in less than one bit each

Only zstd's Huffman code is useful here. Matches that it finds among such numbers by chance mostly cost more than they
save, so the compression level is the lowest that compares the two costs; it is still faster than any teacher's forward
pass.
"""

import struct
from collections.abc import Sequence

import numpy as np
import zstandard

_LENGTH = struct.Struct("<I")
_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(16)
_PLACES = np.array([1, 4, 16, 64], np.uint8)  # place values of the four integers in a byte
# The four integers of each byte value, packed into a uint32, so that one lookup gives all four.
_FOURS = np.ascontiguousarray(np.arange(256)[:, None] // _PLACES % 4, np.uint8).view(np.uint32).reshape(-1)
_LARGEST = 3  # largest of the four integers in a byte
_WINDOW = 4  # bytes that contain an integer of `scales`, at whichever bit it starts
_BITS = 8 * (_WINDOW - 1) + 1  # maximum number of bits after the leading 1
# The leading 1, by the number of bits after it.
_ONES = np.left_shift(1, np.arange(_BITS + 1), dtype=np.int32)


def bytes_for(largest: int) -> int:
    """The number of bytes that hold integers up to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


class StreamsWriter:
    """Writes one record. Streams must be read in the order in which they were added."""

    def __init__(self, checksum: int) -> None:
        self._parts = [_LENGTH.pack(checksum)]
        self._compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)

    def planes(self, values: np.ndarray, width: int) -> None:
        """Adds integers [n] below 256^width."""
        for number in range(width):
            self._add_compressed(values >> 8 * number & 0xFF)

    def scales(self, values: np.ndarray) -> None:
        """Adds integers [n] from 1 and below 2^26."""
        lengths = np.frexp(values)[1] - 1  # number of bits after the leading 1
        self._add_compressed(lengths)
        ends = np.cumsum(lengths)
        at = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        bits = (np.repeat(values, lengths) >> at & 1).astype(np.uint8)
        self._add_frame(np.packbits(bits, bitorder="little").tobytes())

    def small(self, values: np.ndarray, width: int) -> None:
        """Adds integers [n] below 256^width."""
        fours = np.zeros((-(-len(values) // 4), 4), np.uint8)
        fours.reshape(-1)[: len(values)] = np.minimum(values, _LARGEST)
        self._add_compressed(fours @ _PLACES)
        self.planes(values[values >= _LARGEST] - _LARGEST, width)

    def record(self) -> bytes:
        return b"".join(self._parts)

    def _add_compressed(self, values: np.ndarray) -> None:
        self._add_frame(self._compressor.compress(values.astype(np.uint8).tobytes()))

    def _add_frame(self, frame: bytes) -> None:
        self._parts += [_LENGTH.pack(len(frame)), frame]


class StreamsReader:
    """Reads one stream after another, each for all records at once.

    Raises:
        ValueError, IndexError, struct.error, zstandard.ZstdError: a record is damaged; also raised by the methods.
    """

    def __init__(self, records: Sequence[bytes]) -> None:
        self.checksums = [_LENGTH.unpack_from(record)[0] for record in records]
        self._frames = [_split(record) for record in records]
        self._next = 0
        self._decompressor = zstandard.ZstdDecompressor()

    def planes(self, width: int) -> np.ndarray:
        """The integers of all records, concatenated."""
        values: np.ndarray = np.concatenate(self._decompressed())
        for number in range(1, width):
            values = values | np.concatenate(self._decompressed()).astype(np.int32) << 8 * number
        return values

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """The integers of all records, concatenated, int32; and the number of integers of each record."""
        parts, frames = self._decompressed(), self._next_frames()
        lengths = np.concatenate(parts)
        if lengths.max(initial=0) > _BITS:
            raise ValueError("a number is too long")
        counts = np.array([len(part) for part in parts])
        ends = np.cumsum(lengths.astype(np.int64))  # in bits
        taken = np.diff(np.concatenate([[0], ends])[np.cumsum(counts)], prepend=0)  # bits of each record
        sizes = np.array([len(frame) for frame in frames])
        if np.any(sizes != -(-taken // 8)):
            raise ValueError("there are more or fewer bits than numbers")
        skipped = np.cumsum(8 * sizes - taken) - (8 * sizes - taken)  # padding bits in the previous frames
        begin = ends - lengths + np.repeat(skipped, counts)
        joined = b"".join(frames) + bytes(_WINDOW)
        windows = np.ndarray(len(joined) - _WINDOW + 1, "<u4", joined, strides=(1,))  # one per byte
        found = np.ascontiguousarray(windows).take(begin >> 3).astype(np.uint32, copy=False)
        found >>= (begin & 7).astype(np.uint32)
        ones = _ONES.take(lengths)
        return found.view(np.int32) & (ones - 1) | ones, counts

    def small(self, numbers: Sequence[int], width: int) -> np.ndarray:
        """The integers of all records, concatenated; `numbers` are the numbers of integers of each record."""
        parts = zip(self._decompressed(), numbers, strict=True)
        values = np.concatenate([_FOURS.take(part).view(np.uint8)[:number] for part, number in parts])
        above = self.planes(width)
        at = np.flatnonzero(values == _LARGEST)
        values = values.astype(np.promote_types(values.dtype, above.dtype), copy=False)
        values[at] += above
        return values

    def _decompressed(self) -> list[np.ndarray]:
        return [
            np.frombuffer(self._decompressor.decompress(frame), np.uint8) for frame in self._next_frames()
        ]

    def _next_frames(self) -> list[bytes]:
        """The next frame of each record."""
        self._next += 1
        return [frames[self._next - 1] for frames in self._frames]


def _split(record: bytes) -> list[bytes]:
    """The frames of a record."""
    frames, at = [], _LENGTH.size
    while at < len(record):
        (length,) = _LENGTH.unpack_from(record, at)
        at += _LENGTH.size
        if at + length > len(record):
            raise ValueError("a frame is truncated")
        frames.append(record[at : at + length])
        at += length
    return frames
