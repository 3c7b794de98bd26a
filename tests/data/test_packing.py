import json

import grain
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.data.packing import PackedRows

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def packed(lengths: list[int], seq_len: int, endless: bool = False) -> PackedRows:
    """Documents of the given lengths, whose tokens are all different and above 0."""
    ends = np.cumsum(lengths)
    documents = grain.MapDataset.source(
        [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]
    )
    if endless:
        documents = documents.repeat()
    return PackedRows(documents.to_iter_dataset(grain.ReadOptions(num_threads=0)), seq_len)


@given(lengths, st.integers(2, 16))
def test_rows_are_the_documents_end_to_end(lengths: list[int], seq_len: int):
    rows = list(packed(lengths, seq_len))
    real = np.concatenate([row["segment_ids"] for row in rows]) > 0
    tokens = np.concatenate([row["tokens"] for row in rows])
    targets = np.concatenate([row["targets"] for row in rows])
    starts = np.cumsum([0, *lengths[:-1]])
    expected = np.concatenate([np.arange(s, s + n - 1) + 1 for s, n in zip(starts, lengths, strict=True)])
    np.testing.assert_array_equal(tokens[real], expected)
    np.testing.assert_array_equal(targets[real], expected + 1)
    # Only the end of the last row is padding.
    assert real[: len(expected)].all()
    assert len(tokens) - len(expected) < seq_len
    assert not tokens[~real].any()
    assert not targets[~real].any()


@given(lengths, st.integers(2, 16))
def test_segments_count_from_1_and_positions_from_0(lengths: list[int], seq_len: int):
    starts = set(np.cumsum([0, *lengths[:-1]]) + 1)
    for row in packed(lengths, seq_len):
        ids, positions = row["segment_ids"], row["positions"]
        changes = np.flatnonzero(np.diff(ids, prepend=0))
        begins = [
            place for place in range(seq_len) if ids[place] and (place == 0 or row["tokens"][place] in starts)
        ]
        np.testing.assert_array_equal([place for place in changes if ids[place]], begins)
        for place in range(seq_len):
            inside = ids[place] and place not in changes
            assert positions[place] == (positions[place - 1] + 1 if inside else 0)
        np.testing.assert_array_equal(np.unique(ids[ids > 0]), np.arange(len(begins)) + 1)


@given(lengths, st.integers(2, 16), st.integers(0, 20))
def test_state_goes_through_json_at_any_row(lengths: list[int], seq_len: int, taken: int):
    rows = iter(packed(lengths, seq_len, endless=True))
    for _ in range(taken):
        next(rows)
    state = json.dumps(rows.get_state())
    expected = [next(rows) for _ in range(5)]
    fresh = iter(packed(lengths, seq_len, endless=True))
    next(fresh)  # a used iterator can be set back too
    fresh.set_state(json.loads(state))
    for row in expected:
        for name, values in next(fresh).items():
            np.testing.assert_array_equal(values, row[name])
