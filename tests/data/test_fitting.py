import json
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.config import UserError
from gemma2_jax.data.fitting import FittedRows, best_fit
from gemma2_jax.data.masks import MaskedTokens
from gemma2_jax.data.packing import Row

lengths = st.lists(st.integers(2, 24), min_size=1, max_size=30)


def conversations(lengths: list[int]) -> list[MaskedTokens]:
    """Conversations of the given lengths, whose tokens are all different and above 0; every second carries loss."""
    ends = np.cumsum(lengths)
    ids = [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]
    return [MaskedTokens(each, np.arange(len(each)) % 2 == 1) for each in ids]


def fitted(
    examples: list[MaskedTokens], seq_len: int, window: int = 100, drop: bool = False, endless: bool = False
) -> FittedRows:
    # By index: Grain would take the pairs apart.
    source = grain.MapDataset.range(len(examples)).map(lambda index: examples[index])
    if endless:
        source = source.repeat()
    parent = source.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return FittedRows(parent, seq_len, window, len(examples), drop)


def segments(rows: list[Row]) -> list[dict[str, np.ndarray]]:
    """The segments of rows, each an array per name."""
    return [
        {name: values[row["segment_ids"] == segment] for name, values in row.items()}
        for row in rows
        for segment in range(1, row["segment_ids"].max() + 1)
    ]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_decreasing(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= capacity for items in bins)
    # The definition, with all bins in a list.
    expected: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        rooms = [capacity - sum(sizes[other] for other in items) for items in expected]
        fitting = [room for room in rooms if room >= sizes[item]]
        if not fitting:
            expected.append([item])
        else:
            expected[rooms.index(min(fitting))].append(item)
    assert sorted(map(sorted, bins)) == sorted(map(sorted, expected))


def test_few_rows_are_needed() -> None:
    """Best-fit decreasing needs at most 11/9 of the fewest possible rows, and here hardly more than the sizes fill."""
    sizes = np.random.default_rng(0).integers(1, 1024, 4096).tolist()
    assert len(best_fit(sizes, 1024)) <= 1.01 * sum(sizes) / 1024


@given(lengths, st.integers(2, 24), st.integers(1, 12))
def test_conversations_are_never_cut_across_rows(lengths: list[int], seq_len: int, window: int) -> None:
    examples = [MaskedTokens(*(v[: seq_len + 1] for v in each)) for each in conversations(lengths)]
    rows = list(fitted(conversations(lengths), seq_len, window))
    found = sorted(segments(rows), key=lambda each: int(each["tokens"][0]))
    assert len(found) == len(examples)
    for segment, (ids, loss) in zip(found, examples, strict=True):
        np.testing.assert_array_equal(segment["tokens"], ids[:-1])
        np.testing.assert_array_equal(segment["targets"], ids[1:])
        np.testing.assert_array_equal(segment["positions"], np.arange(len(ids) - 1))
        np.testing.assert_array_equal(segment["loss_mask"], loss[1:])


@given(lengths, st.integers(2, 24))
def test_padding_is_zero_and_at_the_end(lengths: list[int], seq_len: int) -> None:
    for row in fitted(conversations(lengths), seq_len):
        used = int((row["segment_ids"] > 0).sum())
        assert used > 0
        for name, values in row.items():
            assert values.shape == (seq_len,)
            assert values.dtype == (np.float32 if name == "loss_mask" else np.int32)
            assert not values[used:].any()


def test_too_long_conversations_are_truncated_or_dropped() -> None:
    examples = conversations([5, 9, 6, 7])
    (row, *more) = segments(list(fitted(examples, 5)))
    assert [len(each["tokens"]) for each in [row, *more]] == [4, 5, 5, 5]
    kept = segments(list(fitted(examples, 5, drop=True)))
    assert [each["tokens"][0] for each in kept] == [examples[0].ids[0], examples[2].ids[0]]


def test_conversations_without_loss_are_left_out() -> None:
    late = MaskedTokens(np.arange(6) + 1, np.arange(6) == 5)
    assert len(list(fitted([late], 5))) == 1
    assert list(fitted([late], 4)) == []
    assert list(fitted([late], 4, drop=True)) == []


def test_an_endless_stream_without_rows_ends_with_an_error() -> None:
    late = [MaskedTokens(np.arange(6) + 1, np.arange(6) == 5)] * 7
    with pytest.raises(
        UserError, match=r"None of the 7 conversations of a stream has loss within data\.seq_len \(4\)"
    ):
        next(iter(fitted(late, 4, window=3, endless=True)))


def test_an_epoch_is_the_largest_window() -> None:
    examples = conversations([3, 4, 5, 6])
    rows = iter(fitted(examples, 8, window=1000, endless=True))
    epoch = list(fitted(examples, 8))
    for row in [*epoch, *epoch]:
        for name, values in next(rows).items():
            np.testing.assert_array_equal(values, row[name])


@given(lengths, st.integers(2, 16), st.integers(1, 9), st.integers(0, 20))
def test_state_goes_through_json_at_any_row(
    lengths: list[int], seq_len: int, window: int, taken: int
) -> None:
    def begin() -> Any:
        return iter(fitted(conversations(lengths), seq_len, window, endless=True))

    rows = begin()
    for _ in range(taken):
        next(rows)
    state = json.dumps(rows.get_state())
    expected = [next(rows) for _ in range(5)]
    fresh = begin()
    next(fresh)  # a used iterator can be set back too
    fresh.set_state(json.loads(state))
    for row in expected:
        for name, values in next(fresh).items():
            np.testing.assert_array_equal(values, row[name])
