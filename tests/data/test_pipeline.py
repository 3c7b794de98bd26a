import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import chex
import grain
import jax
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.shards import read_data_manifest
from tests.parameters import mostly_thorough

Document = tuple[int, ...]


def stored(data: DataConfig, split: str) -> list[Document]:
    manifest = read_data_manifest(data.folder)
    shards = manifest.train_shards if split == "train" else manifest.validation_shards
    source = ArrayRecordDataSource([str(Path(data.folder) / shard.file) for shard in shards])
    return [tuple(np.frombuffer(record, manifest.dtype).tolist()) for record in source]


def unpacked(batches: list[Batch], bos: int = 2, eos: int = 1) -> list[Document]:
    """Documents of consecutive batches, whole or cut at the two ends: segments joined at the ends of rows."""
    documents: list[Document] = []
    open_document: list[int] = []
    for batch in batches:
        for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.segment_ids, strict=True):
            for segment in range(1, int(ids.max()) + 1):
                inside = ids == segment
                assert tokens[inside][1:].tolist() == targets[inside][:-1].tolist()
                if not open_document:
                    open_document = [int(tokens[inside][0])]
                assert tokens[inside][0] == open_document[-1]  # it goes on where it was cut
                open_document += targets[inside].tolist()
                if open_document[-1] == eos:
                    assert open_document[0] == bos
                    documents.append(tuple(open_document))
                    open_document = []
    return documents


def batches_of_epochs(data: DataConfig, epochs: int, tokens: int) -> int:
    return -(-epochs * tokens // (data.batch_size * data.seq_len))


def assert_same(left: Batch, right: Batch) -> None:
    chex.assert_trees_all_equal(left, right)


def test_batches_are_full_rows_of_int32(data: DataConfig):
    iterator = train_batches(data)
    assert isinstance(iterator, grain.DatasetIterator)  # what a checkpoint can hold
    for batch in itertools.islice(iterator, 50):
        assert isinstance(batch, Batch)
        for name in ("tokens", "targets", "positions", "segment_ids"):
            assert getattr(batch, name).shape == (4, 32)
            assert getattr(batch, name).dtype == np.int32
        assert batch.loss_mask.dtype == np.float32
        assert batch.segment_ids.min() == 1  # no padding
        assert (batch.loss_mask == 1).all()


def test_batch_is_a_pytree(data: DataConfig):
    batch = next(train_batches(data))
    assert len(jax.tree.leaves(batch)) == 5
    doubled = jax.jit(lambda batch: jax.tree.map(lambda leaf: 2 * leaf, batch))(batch)
    assert isinstance(doubled, Batch)
    np.testing.assert_array_equal(doubled.targets, 2 * batch.targets)


def test_every_document_comes_once_an_epoch_in_another_order(data: DataConfig):
    documents = stored(data, "train")
    tokens = sum(len(document) - 1 for document in documents)
    seen = unpacked(list(itertools.islice(train_batches(data), batches_of_epochs(data, 3, tokens))))
    epochs = [seen[epoch * len(documents) : (epoch + 1) * len(documents)] for epoch in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(documents)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != documents


def test_seed_decides_the_order(data: DataConfig):
    first = next(train_batches(data))
    assert_same(next(train_batches(data)), first)
    assert not np.array_equal(next(train_batches(replace(data, seed=1))).tokens, first.tokens)


@mostly_thorough("shuffle_buffer", [8, 0, 30])
@mostly_thorough("taken", [17, 0, 1, 2, 3, 60])
def test_resumed_is_uninterrupted(data: DataConfig, taken: int, shuffle_buffer: int):
    data = replace(data, shuffle_buffer=shuffle_buffer)
    iterator = train_batches(data)
    for _ in range(taken):
        next(iterator)
    state = json.dumps(iterator.get_state())
    assert len(state) < 200
    expected = list(itertools.islice(iterator, 20))
    resumed = train_batches(data)
    resumed.set_state(json.loads(state))
    for batch in expected:
        assert_same(next(resumed), batch)


def rows_of(batches: Iterable[Batch]) -> list[bytes]:
    """Each row's tokens and segments, in order."""
    return [
        np.concatenate(row).tobytes()
        for batch in batches
        for row in zip(batch.tokens, batch.segment_ids, strict=True)
    ]


def test_shuffling_permutes_the_rows_of_each_buffer(data: DataConfig):
    plain = rows_of(itertools.islice(train_batches(data), 60))
    shuffled = rows_of(itertools.islice(train_batches(replace(data, shuffle_buffer=12)), 60))
    windows = [(plain[first : first + 12], shuffled[first : first + 12]) for first in range(0, 240, 12)]
    for before, after in windows:
        assert Counter(before) == Counter(after)
    orders = {tuple(before.index(row) for row in after) for before, after in windows}
    assert len(orders) > 10  # not one permutation again and again
    again = rows_of(itertools.islice(train_batches(replace(data, shuffle_buffer=12)), 60))
    assert again == shuffled
    other = rows_of(itertools.islice(train_batches(replace(data, shuffle_buffer=12, seed=1)), 60))
    assert other != shuffled


@pytest.mark.parametrize("streams", [1, 2])
def test_a_long_document_is_spread(tokenizer_config: TokenizerConfig, streams: int, tmp_path: Path):
    texts = ["probability " * 100, *(f"{number} attention window" for number in range(800))]
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(str(source), str(tmp_path / "data"), 0.0, 32, 4, seed=0, workers=1, streams=streams)
    epoch = prepare(data, tokenizer_config).train.tokens // (4 * 32)

    def of_long_document(data: DataConfig) -> list[int]:
        """Number of rows in each batch that hold part of a single document longer than a row."""
        batches = itertools.islice(train_batches(data), epoch)
        return [int((batch.segment_ids.max(axis=1) == 1).sum()) for batch in batches]

    plain, spread = of_long_document(data), of_long_document(replace(data, shuffle_buffer=10_000))
    assert sum(number >= 4 // streams for number in plain) >= 4
    assert max(spread) < 4
    assert sum(number > 0 for number in spread) > 1.5 * sum(number > 0 for number in plain)


def test_no_row_comes_again_before_all_came(data: DataConfig):
    """A buffer larger than the number of rows does not mix epochs."""
    counts = read_data_manifest(data.folder).train
    epoch = (counts.tokens - counts.documents) // data.seq_len
    plain = rows_of(itertools.islice(train_batches(data), epoch // 4 + 1))
    shuffled = rows_of(itertools.islice(train_batches(replace(data, shuffle_buffer=10**6)), epoch // 4 + 1))
    assert Counter(shuffled[:epoch]) == Counter(plain[:epoch])
    assert shuffled != plain


def test_the_largest_seed_shuffles_rows(data: DataConfig):
    data = replace(data, seed=2**32 - 1, shuffle_buffer=8)
    assert len(rows_of(itertools.islice(train_batches(data), 10))) == 40


@mostly_thorough("shuffle_buffer", [0, 12, 1000])
@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.thorough), 2, 4])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_processes_share_the_batches_of_one(
    data: DataConfig, streams: int, processes: int, shuffle_buffer: int
):
    data = replace(data, streams=streams, shuffle_buffer=shuffle_buffer)
    whole, shares = train_batches(data), [train_batches(data, index, processes) for index in range(processes)]
    for _ in range(30):
        parts = [next(share) for share in shares]
        assert parts[0].tokens.shape == (4 // processes, 32)
        assert_same(next(whole), jax.tree.map(lambda *rows: np.concatenate(rows), *parts))
    states = [share.get_state() for share in shares]
    if streams == 1:
        assert all(state == whole.get_state() for state in states)
    else:  # each has its own, and all together have that of one process
        assert {name: value for state in states for name, value in state.items()} == whole.get_state()


@pytest.mark.parametrize("part", [slice(1000, 4000), slice(65_536, 65_600)], ids=["records", "index"])
def test_damaged_shards_are_reported(data: DataConfig, tmp_path: Path, part: slice):
    damaged = replace(data, folder=str(shutil.copytree(data.folder, tmp_path / "data")))
    for shard in read_data_manifest(damaged.folder).train_shards:
        content = bytearray((tmp_path / "data" / shard.file).read_bytes())
        content[part] = bytes(byte ^ 0x55 for byte in content[part])
        (tmp_path / "data" / shard.file).write_bytes(content)
    with pytest.raises(UserError, match=r"A shard of data\.folder .* is damaged; `gemma2 data verify`"):
        list(itertools.islice(train_batches(damaged), 100))


def test_streams_divide_the_documents(data: DataConfig):
    documents = stored(data, "train")
    tokens = sum(len(document) - 1 for document in documents)
    batches = list(
        itertools.islice(train_batches(replace(data, streams=2)), batches_of_epochs(data, 3, tokens))
    )
    halves = [
        unpacked([jax.tree.map(lambda rows, rows_of=rows_of: rows[rows_of], batch) for batch in batches])
        for rows_of in (slice(0, 2), slice(2, 4))
    ]
    for number, half in enumerate(halves):
        own = documents[number::2]
        assert Counter(half[: len(own)]) == Counter(own) == Counter(half[len(own) : 2 * len(own)])


@pytest.mark.parametrize("shuffle_buffer", [0, 30])
def test_streams_go_on_where_they_were(data: DataConfig, shuffle_buffer: int):
    data = replace(data, streams=4, shuffle_buffer=shuffle_buffer)
    iterator = train_batches(data)
    for _ in range(17):
        next(iterator)
    states = json.loads(json.dumps(iterator.get_state()))
    resumed = train_batches(data, 1, 2)  # which takes its own of them
    resumed.set_state(states)
    for batch in itertools.islice(iterator, 10):
        assert_same(next(resumed), jax.tree.map(lambda rows: rows[2:], batch))


@pytest.mark.parametrize("batch_size", [3, 4, 10])
def test_validation_is_every_document_once(data: DataConfig, batch_size: int):
    batches = list(validation_batches(replace(data, batch_size=batch_size)))
    assert unpacked(batches) == stored(data, "validation")
    for batch in batches:
        assert batch.tokens.shape == (batch_size, 32)
        np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids > 0)
    padding = np.concatenate([batch.loss_mask.ravel() for batch in batches]) == 0
    assert 0 < padding.sum() < batch_size * 32
    assert padding[-padding.sum() :].all()


def test_validation_can_be_repeated_and_divided(data: DataConfig):
    data = replace(data, batch_size=14)
    dataset = validation_batches(data)
    once, again = list(dataset), list(dataset)
    assert once[-1].segment_ids[-1].max() == 0  # rows of padding alone are divided too
    halves = [list(validation_batches(data, index, 2)) for index in range(2)]
    assert len(once) == len(again) == len(halves[0]) == len(halves[1])
    for batch, same, upper, lower in zip(once, again, *halves, strict=True):
        assert_same(batch, same)
        assert_same(batch, jax.tree.map(lambda *rows: np.concatenate(rows), upper, lower))


def test_a_limited_validation_is_a_sample_of_all_documents(data: DataConfig):
    documents = stored(data, "validation")
    sample = list(validation_batches(data, limit=2))
    assert len(sample) == 2
    assert sum(batch.loss_mask.sum() for batch in sample) == 2 * 4 * 32  # no padding
    whole = unpacked(sample)
    assert set(whole) <= set(documents)
    assert max(documents.index(document) for document in whole) > len(documents) // 2
    for batch, same in zip(sample, validation_batches(replace(data, seed=5), limit=2), strict=True):
        assert_same(batch, same)
    halves = [list(validation_batches(data, index, 2, limit=2)) for index in range(2)]
    for batch, upper, lower in zip(sample, *halves, strict=True):
        assert_same(batch, jax.tree.map(lambda *rows: np.concatenate(rows), upper, lower))


def test_a_limit_that_all_documents_fit_into_changes_nothing(data: DataConfig):
    whole = list(validation_batches(data))
    for batch, same in zip(whole, validation_batches(data, limit=len(whole)), strict=True):
        assert_same(batch, same)
    assert len(list(validation_batches(data, limit=len(whole) - 1))) == len(whole) - 1


def test_impossible_shares_are_refused(data: DataConfig):
    with pytest.raises(
        UserError, match=r"data\.batch_size is 4; it must be a multiple of 3, the number of process shares"
    ):
        train_batches(data, 0, 3)
    with pytest.raises(UserError, match=r"share is 2; it must be at least 0 and below shares"):
        validation_batches(data, 2, 2)
    with pytest.raises(UserError, match=r"\d+ documents to train on, fewer than data\.streams \(400\)"):
        train_batches(replace(data, batch_size=400, streams=400))
    with pytest.raises(UserError, match=r"data\.streams is 3; it must divide data\.batch_size \(4\)"):
        replace(data, streams=3)
    with pytest.raises(UserError, match=r"data\.shuffle_buffer is -1; it must be a number of rows, or 0"):
        replace(data, shuffle_buffer=-1)


def test_unprepared_folders_and_empty_splits_are_refused(
    data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
):
    with pytest.raises(UserError, match=r"is not prepared; run `gemma2 data prepare` with"):
        train_batches(replace(data, folder=str(tmp_path / "nothing")))
    everything = replace(data, folder=str(tmp_path / "data"), validation_fraction=0.0)
    prepare(everything, tokenizer_config)
    next(train_batches(everything))
    with pytest.raises(UserError, match=r"has no validation documents; .* data\.validation_fraction above 0"):
        validation_batches(everything)
