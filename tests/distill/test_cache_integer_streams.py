"""Integers are encoded as bytes and decoded again, in about as much space as their entropy."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.distill.cache.integer_streams import StreamsReader, StreamsWriter, bytes_for

Values = list[list[int]]  # of each record


def rows(low: int, high: int) -> st.SearchStrategy[Values]:
    near = st.integers(low, min(high, low + 4))
    return st.lists(st.lists(near | st.integers(low, high), max_size=40), min_size=1, max_size=4)


def written(values: Values, write: Callable[[StreamsWriter, np.ndarray], None]) -> list[bytes]:
    records = []
    for number, row in enumerate(values):
        writer = StreamsWriter(number)
        write(writer, np.array(row, np.int64))
        records.append(writer.record())
    return records


def joined(values: Values) -> list[int]:
    return [value for row in values for value in row]


@given(scales=rows(1, 2**26 - 1), small=rows(0, 2**16 - 1), planes=rows(0, 2**24 - 1))
def test_all_streams_come_back_in_their_order(scales: Values, small: Values, planes: Values) -> None:
    count = min(len(scales), len(small), len(planes))
    records = []
    for number in range(count):
        writer = StreamsWriter(7 + number)
        writer.scales(np.array(scales[number], np.int64))
        writer.small(np.array(small[number], np.int64), 2)
        writer.planes(np.array(planes[number], np.int64), 3)
        records.append(writer.record())
    reader = StreamsReader(records)
    assert reader.checksums == [7 + number for number in range(count)]
    found, counts = reader.scales()
    assert found.tolist() == joined(scales[:count])
    assert counts.tolist() == [len(row) for row in scales[:count]]
    assert reader.small([len(row) for row in small[:count]], 2).tolist() == joined(small[:count])
    assert reader.planes(3).tolist() == joined(planes[:count])


@given(st.integers(1, 2**40))
def test_the_bytes_are_the_least_that_holds_a_number(largest: int) -> None:
    assert 256 ** bytes_for(largest) > largest >= 256 ** (bytes_for(largest) - 1)


def entropy(values: np.ndarray) -> float:
    """Entropy in bytes of independent numbers."""
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-np.sum(shares * np.log2(shares)) * len(values) / 8)


@pytest.mark.parametrize(("mean", "most"), [(3, 1.15), (30, 1.03), (300, 1.02), (3000, 1.02)])
def test_gaps_take_little_more_than_their_entropy(mean: int, most: float) -> None:
    """Geometric gaps, as ids drawn evenly have. That of one bit length the shorter are the likelier is not made use
    of; where nearly all are below 8, a Huffman code's whole bits cost more.
    """
    values = np.random.default_rng(mean).geometric(1 / mean, 32_000)
    exact = np.log2(mean) - np.log2(1 - 1 / mean) * (mean - 1)  # bits a number, of the distribution
    (record,) = written([values.tolist()], StreamsWriter.scales)
    assert 1 <= 8 * len(record) / len(values) / exact < most


@pytest.mark.parametrize(("once", "most"), [(0.95, 1.65), (0.8, 1.1), (0.6, 1.1)])
def test_numbers_of_draws_take_less_than_a_byte_each_compressed(once: float, most: float) -> None:
    values = np.random.default_rng(0).geometric(once, 32_000) - 1
    (record,) = written([values.tolist()], lambda writer, row: writer.small(row, 1))
    assert 1 <= len(record) / entropy(values) < most
    each = zstandard.ZstdCompressor(level=3).compress(values.astype(np.uint8).tobytes())
    assert len(record) < 0.8 * len(each)


def test_an_incomplete_record_is_reported() -> None:
    values = [np.random.default_rng(row).integers(1, 5000, 50).tolist() for row in range(2)]
    first, second = written(values, StreamsWriter.scales)
    for cut in (1, 5, len(first) - 1, len(first) - 40):
        with pytest.raises((ValueError, IndexError, struct.error, zstandard.ZstdError)):
            StreamsReader([first[:-cut], second]).scales()
    long = StreamsWriter(0)  # bit lengths that no number has
    long.planes(np.full(3, 200), 1)
    long.planes(np.zeros(75, int), 1)
    with pytest.raises(ValueError, match="too long"):
        StreamsReader([long.record()]).scales()
    fewer = StreamsWriter(0)
    fewer.planes(np.full(100, 20), 1)
    fewer.planes(np.zeros(5, int), 1)
    with pytest.raises(ValueError, match="fewer bits"):
        StreamsReader([fewer.record()]).scales()
