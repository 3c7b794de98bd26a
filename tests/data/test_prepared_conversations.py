"""From files of conversations to batches, by way of a prepared folder."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import ConversationsConfig, DataConfig, TokenizerConfig
from gemma2_jax.data.masks import encode_conversation
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.prepare import prepare, verify_source
from gemma2_jax.data.shards import MANIFEST, read_data_manifest, verify
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from tests.parameters import mostly_thorough

Chats = list[list[tuple[str, str]]]
Found = tuple[tuple[int, ...], tuple[float, ...]]  # ids and loss mask of a conversation


def encoded(chats: Chats, tokenizer: Tokenizer, T: int | None = None, **settings: Any) -> Counter[Found]:
    """The conversations as they should be found in rows, truncated to T targets."""
    names = {"user": "user", "assistant": "model"}
    found: Counter[Found] = Counter()
    for chat in chats:
        turns = [(names[role], content) for role, content in chat]
        ids, loss = encode_conversation(tokenizer, turns, ConversationsConfig(**settings))
        end = None if T is None else T + 1
        found[tuple(ids[:end].tolist()), tuple(loss[:end].astype(float).tolist())] += 1
    return found


def in_rows(batches: Iterable[Batch]) -> Counter[Found]:
    found: Counter[Found] = Counter()
    for batch in batches:
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, int(segments.max()) + 1):
                at = segments == segment
                ids = (int(batch.tokens[row][at][0]), *batch.targets[row][at].tolist())
                assert batch.tokens[row][at].tolist() == list(ids[:-1])
                assert batch.positions[row][at].tolist() == list(range(int(at.sum())))
                found[ids, (0.0, *batch.loss_mask[row][at].tolist())] += 1
    return found


def epoch(data: DataConfig) -> Counter[Found]:
    """The conversations of the first batches, in which each of the training split must appear once."""
    documents = read_data_manifest(data.folder).train.documents
    batches, found = train_batches(data), Counter[Found]()
    while found.total() < documents:
        found += in_rows([next(batches)])
    return found


def record(chat: Iterable[tuple[str, str]]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in chat]}) + "\n"


def prepared(
    base: DataConfig, tokenizer: TokenizerConfig, tmp_path: Path, chats: Chats, **changes: Any
) -> DataConfig:
    (tmp_path / "chats.jsonl").write_text("".join(map(record, chats)))
    paths = {"source": str(tmp_path / "chats.jsonl"), "folder": str(tmp_path / "data")}
    config = replace(base, **(paths | changes))
    prepare(config, tokenizer)
    return config


def test_an_epoch_has_every_conversation_once(
    conversations: DataConfig, tokenizer: Tokenizer, chats: Chats
) -> None:
    # One window an epoch, whose rows fill whole batches of one row.
    found = epoch(replace(conversations, batch_size=1))
    expected = encoded(chats, tokenizer, 128)
    held_out = in_rows(validation_batches(conversations))
    assert found + held_out == expected
    assert found.total() > 100
    assert held_out.total() > 10


def test_rows_are_well_filled(conversations: DataConfig) -> None:
    manifest = read_data_manifest(conversations.folder)
    rows = manifest.train_lengths.rows(128)
    batches = list(itertools.islice(train_batches(replace(conversations, batch_size=1)), rows))
    assert np.mean([batch.segment_ids > 0 for batch in batches]) > 0.9
    # In no order: long conversations are not in the first rows alone.
    longest = [int(np.bincount(batch.segment_ids[0])[1:].max()) for batch in batches]
    assert sorted(longest, reverse=True) != longest


def test_settings_decide_the_mask(
    conversations: DataConfig,
    tokenizer_config: TokenizerConfig,
    tokenizer: Tokenizer,
    chats: Chats,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"loss_on": "last", "newline": True}
    data = prepared(
        conversations,
        tokenizer_config,
        tmp_path,
        chats,
        conversations=ConversationsConfig(**settings),
        seq_len=512,
        validation_fraction=0.0,
        batch_size=1,
    )
    assert epoch(data) == encoded(chats, tokenizer, **settings)


def test_manifest_counts_contents_and_tokens(
    conversations: DataConfig, tokenizer: Tokenizer, chats: Chats
) -> None:
    manifest = read_data_manifest(conversations.folder)
    assert len(manifest.train_shards) > 1
    assert manifest.conversations == ConversationsConfig()
    total = manifest.train + manifest.validation
    assert total.documents == len(chats)
    assert total.characters == sum(len("\n".join(content for _, content in chat)) for chat in chats)
    expected = encoded(chats, tokenizer)
    assert total.tokens == sum(len(ids) for ids, _ in expected.elements())
    loss = sum(sum(mask) for _, mask in expected.elements())
    assert manifest.train_lengths.loss_tokens + manifest.validation_lengths.loss_tokens == loss
    assert verify(conversations.folder) > 1
    assert verify_source(conversations.folder)


def test_processes_write_what_one_would(
    conversations: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    prepare(replace(conversations, folder=str(tmp_path), workers=2), tokenizer_config)
    for shard in read_data_manifest(tmp_path).train_shards:
        assert (tmp_path / shard.file).read_bytes() == Path(conversations.folder, shard.file).read_bytes()


@mostly_thorough("streams", [2, 1])
@mostly_thorough("taken", [5, 0, 1])
def test_resumed_is_uninterrupted(conversations: DataConfig, taken: int, streams: int) -> None:
    data = replace(conversations, streams=streams, packing_window=20, shuffle_buffer=8)
    iterator = train_batches(data)
    for _ in range(taken):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = list(itertools.islice(iterator, 5))
    resumed = train_batches(data)
    resumed.set_state(json.loads(state))
    for batch in expected:
        chex.assert_trees_all_equal(next(resumed), batch)


def test_shares_are_parts_of_the_same_batches(conversations: DataConfig) -> None:
    whole = next(train_batches(conversations))
    parts = [next(train_batches(conversations, share, 2)) for share in range(2)]
    for name in ("tokens", "targets", "loss_mask"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)
        )


def test_a_sample_of_the_validation_split(conversations: DataConfig) -> None:
    (first,), (again,) = (list(validation_batches(conversations, limit=1)) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    everything = list(validation_batches(conversations, limit=100))
    assert in_rows(everything) == in_rows(validation_batches(conversations))


def test_too_long_conversations_are_counted(
    conversations: DataConfig,
    tokenizer_config: TokenizerConfig,
    chats: Chats,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = prepared(conversations, tokenizer_config, tmp_path, chats, seq_len=48)
    manifest = read_data_manifest(data.folder)
    lengths = manifest.train_lengths
    longer, all_ = lengths.longer(48), manifest.train.documents
    assert 0 < longer < all_
    note = f"{longer} of {all_} conversations to train on are longer than data.seq_len (48)"
    assert f"{note} and truncated" in capsys.readouterr().err
    dropped = prepared(
        conversations,
        tokenizer_config,
        tmp_path,
        chats,
        folder=str(tmp_path / "2"),
        seq_len=48,
        too_long="drop",
    )
    assert f"{note} and dropped" in capsys.readouterr().err
    kept = in_rows(itertools.islice(train_batches(dropped), 30))
    assert len(kept) == all_ - longer
    assert all(len(ids) <= 49 for ids, _ in kept)


def test_a_data_set_without_a_terminator_with_loss_is_refused(
    conversations: DataConfig, tokenizer_config: TokenizerConfig, chats: Chats, tmp_path: Path
) -> None:
    long = [[("user", "a " * 30 + str(number)), ("assistant", "b " * 30)] for number in range(5)]
    with pytest.raises(
        UserError, match=r"no <end_of_turn> within data\.seq_len \(100\) .*; data\.seq_len=(\d+)"
    ) as caught:
        prepared(conversations, tokenizer_config, tmp_path, long, seq_len=100)
    enough = int(str(caught.value).rpartition("data.seq_len=")[2].partition(" ")[0])
    data = prepared(
        conversations, tokenizer_config, tmp_path, long, seq_len=enough, validation_fraction=0.0,
        folder=str(tmp_path / "b"),
    )  # fmt: skip
    ends = [batch.targets[batch.loss_mask > 0] for batch in itertools.islice(train_batches(data), 3)]
    assert Tokenizer.load(tokenizer_config.path).end_of_turn_id in np.concatenate(ends)
    for call in (prepare, train_batches):
        arguments: tuple[Any, ...] = (tokenizer_config,) if call is prepare else ()
        with pytest.raises(UserError, match=r"no <end_of_turn> within data\.seq_len"):
            call(replace(data, seq_len=enough - 1), *arguments)
        with pytest.raises(
            UserError, match=r"data\.too_long is drop, and all 5 .* are longer than data\.seq_len"
        ):
            call(replace(data, seq_len=enough - 1, too_long="drop"), *arguments)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"conversations": None},
            r"from conversations, but .* of text; write data=conversations to use it, set anoth",
        ),
        (
            {"conversations": ConversationsConfig(newline=True, loss_on="last")},
            r"with a different data\.conversations\.loss_on \(all, now last\), a different "
            r"data\.conversations\.newline \(False, now True\); write data\.conversations\.loss_on=all "
            r"data\.conversations\.newline=false to use it, set another folder, as in data\.folder=.*-2, or delete",
        ),
        (
            {"conversations": ConversationsConfig(system="fold")},
            r"data\.conversations\.system=refuse to use it",
        ),
    ],
)
def test_other_settings_are_refused(
    conversations: DataConfig,
    tokenizer_config: TokenizerConfig,
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
) -> None:
    other = replace(conversations, **changes)
    calls: list[Callable[[], Any]] = [lambda: prepare(other, tokenizer_config), lambda: train_batches(other)]
    for call in calls:
        with pytest.raises(UserError, match=sentence):
            call()
    # Also if the preparation was stopped.
    folder = tmp_path / "stopped"
    shutil.copytree(conversations.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(UserError, match=sentence):
        prepare(replace(other, folder=str(folder)), tokenizer_config)


def test_a_folder_of_text_is_refused_for_conversations(
    data: DataConfig, conversations: DataConfig, tokenizer_config: TokenizerConfig
) -> None:
    with pytest.raises(
        UserError, match=r"was prepared from text, but .* of conversations; write data=files to use"
    ):
        prepare(replace(conversations, folder=data.folder), tokenizer_config)


def test_older_versions_refuse_the_folder_and_read_those_of_text(
    data: DataConfig, conversations: DataConfig
) -> None:
    assert read_data_manifest(data.folder).format == 2
    assert read_data_manifest(conversations.folder).format == 3


def test_a_folder_of_text_made_by_an_older_version_is_read(data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(data.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["conversations"]
    for part in manifest["parts"]:
        for split in ("train", "validation"):
            if part[split]:
                del part[split]["lengths"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    chex.assert_trees_all_equal(
        next(train_batches(replace(data, folder=str(folder)))), next(train_batches(data))
    )


def test_a_single_conversation_is_not_cut(
    conversations: DataConfig, tokenizer_config: TokenizerConfig, chats: Chats, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"holds one conversation, .*; add others, or set data\.validation_fraction=0"
    ):
        prepared(conversations, tokenizer_config, tmp_path, chats[:1])
    data = prepared(conversations, tokenizer_config, tmp_path, chats[:1], validation_fraction=0.0)
    assert read_data_manifest(data.folder).train.documents == 1


def test_a_source_without_conversations_is_refused(
    conversations: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds no conversation\."):
        prepared(conversations, tokenizer_config, tmp_path, [])


def test_a_tokenizer_is_trained_on_the_contents_of_the_turns(
    conversations: DataConfig, chats: Chats, tmp_path: Path
) -> None:
    config = TokenizerConfig(str(tmp_path / "own.model"), 360)
    data = prepared(conversations, config, tmp_path, chats, validation_fraction=0.0)
    texts = ["\n".join(content for _, content in chat) for chat in chats]
    expected = train_tokenizer(texts, tmp_path / "expected.model", 360)
    assert read_data_manifest(data.folder).tokenizer == expected.fingerprint


def test_a_stream_takes_its_share(conversations: DataConfig, tokenizer: Tokenizer, chats: Chats) -> None:
    found = in_rows(itertools.islice(train_batches(replace(conversations, streams=2)), 30))
    held_out = in_rows(validation_batches(conversations))
    assert set(found) == set(encoded(chats, tokenizer, 128)) - set(held_out)
