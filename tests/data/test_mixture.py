"""Several sources in one data set."""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import ConversationsConfig, DataConfig, MixtureSource, TokenizerConfig
from gemma2_jax.data.mixture import components
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.prepare import prepare, verify_source
from gemma2_jax.data.shards import read_data_manifest, verify

WEIGHTS = (3.0, 1.0)


@pytest.fixture(scope="module")
def mixture(
    data: DataConfig,
    conversations: DataConfig,
    tokenizer_config: TokenizerConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> DataConfig:
    """Three rows of conversations for every row of text."""
    config = replace(
        conversations,
        source=(),
        folder=str(tmp_path_factory.mktemp("mixture") / "data"),
        mixture=(
            MixtureSource(conversations.source, WEIGHTS[0], "conversations"),
            MixtureSource(data.source, WEIGHTS[1]),
        ),
    )
    prepare(config, tokenizer_config)
    return config


def rows(batches: Iterable[Batch]) -> list[bytes]:
    return [
        tokens.tobytes() + mask.tobytes()
        for batch in batches
        for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True)
    ]


def test_rows_alternate_by_weight(mixture: DataConfig) -> None:
    found = rows(itertools.islice(train_batches(mixture), 10))
    parts = [rows(itertools.islice(train_batches(part), 10)) for part, _ in components(mixture)]
    counts = [sum(row in set(part) for row in found) for part in parts]
    assert counts == [30, 10]
    # Each in its own order.
    for part in parts:
        own = [row for row in found if row in set(part)]
        assert own == part[: len(own)]


def test_text_and_conversations_carry_loss_as_alone(mixture: DataConfig) -> None:
    batch = next(train_batches(mixture))
    full = (batch.loss_mask == (batch.segment_ids > 0)).all(axis=1)
    assert full.sum() == 1
    assert 0 < batch.loss_mask[~full].mean() < 0.9


def test_the_manifest_is_that_of_all_sources(
    mixture: DataConfig, data: DataConfig, conversations: DataConfig
) -> None:
    manifest = read_data_manifest(mixture.folder)
    parts = [read_data_manifest(config.folder) for config in (conversations, data)]
    assert manifest.train == parts[0].train + parts[1].train
    assert manifest.validation == parts[0].validation + parts[1].validation
    assert manifest.train_lengths == parts[0].train_lengths
    assert verify(mixture.folder) == sum(len([*part.train_shards, *part.validation_shards]) for part in parts)
    assert verify_source(mixture.folder)


def test_validation_has_every_document_of_every_source(mixture: DataConfig) -> None:
    parts = [rows(validation_batches(part)) for part, _ in components(mixture)]
    assert rows(validation_batches(mixture)) == [*parts[0], *parts[1]]
    batches = validation_batches(mixture, limit=4)
    assert len(list(batches)) == len(list(batches)) <= 4


@pytest.mark.parametrize("streams", [1, 2])
def test_resumed_is_uninterrupted_on_any_number_of_processes(mixture: DataConfig, streams: int) -> None:
    config = replace(mixture, streams=streams)
    iterator = train_batches(config)
    for _ in range(3):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(4)]
    resumed = train_batches(config)
    resumed.set_state(json.loads(state))
    shares = [train_batches(config, share, 2) for share in range(2)]
    for share in shares:
        share.set_state(json.loads(state))
    for batch in expected:
        chex.assert_trees_all_equal(next(resumed), batch)
        parts = [next(share) for share in shares]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), batch.tokens)


def test_a_prepared_mixture_is_not_prepared_again(
    mixture: DataConfig, tokenizer_config: TokenizerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_data_manifest(mixture.folder)
    weights = tuple(replace(part, weight=part.weight * 2) for part in mixture.mixture)
    assert prepare(replace(mixture, mixture=weights), tokenizer_config) == manifest
    assert "tokenising" not in capsys.readouterr().err


def test_other_folders_are_refused(
    mixture: DataConfig, data: DataConfig, conversations: DataConfig, tokenizer_config: TokenizerConfig
) -> None:
    before = read_data_manifest(data.folder)
    with pytest.raises(
        UserError, match=r"was prepared from data\.source, not from data\.mixture; set another folder"
    ):
        prepare(replace(mixture, folder=data.folder), tokenizer_config)
    assert read_data_manifest(data.folder) == before
    other = replace(conversations, folder=mixture.folder)
    calls: list[Callable[[], Any]] = [lambda: prepare(other, tokenizer_config), lambda: train_batches(other)]
    for call in calls:
        with pytest.raises(
            UserError, match=r"was prepared from data\.mixture, but the configuration has data\.source"
        ):
            call()


def test_an_error_names_its_source(
    mixture: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    wrong = MixtureSource(str(tmp_path / "a.jsonl"), 1.0, "conversations")
    config = replace(mixture, folder=str(tmp_path / "data"), mixture=(mixture.mixture[1], wrong))
    with pytest.raises(
        UserError, match=r"^data\.mixture\[1\]: .*a\.jsonl, line 1: no conversation \(its keys are text\)"
    ):
        prepare(config, tokenizer_config)
    assert not (tmp_path / "data" / "1").exists()
    assert read_data_manifest(tmp_path / "data" / "0").complete  # and is not prepared again


def test_a_tokenizer_must_exist(mixture: DataConfig, tmp_path: Path) -> None:
    config = replace(mixture, folder=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no tokenizer file .*own\.model, which a mixture needs"):
        prepare(config, TokenizerConfig(str(tmp_path / "own.model"), 400))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"source": "a/*.txt"}, r"data\.source is 'a/\*\.txt' and data\.mixture is set; data\.source=\[\]"),
        (
            {"mixture": (MixtureSource("a", 0.0),)},
            r"data\.mixture\[0\]\.weight is 0\.0; it must be a number above 0",
        ),
        ({"mixture": (MixtureSource((), 1.0),)}, r"data\.mixture\[0\]\.source is \(\)"),
        (
            {"conversations": None},
            r"data\.mixture\[0\]\.kind is conversations, but data\.conversations is null",
        ),
        ({"mixture": ()}, r"data\.source is \(\); accepted"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(
    mixture: DataConfig, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(mixture, **changes)
    assert mixture.conversations == ConversationsConfig()


def test_a_mixture_of_text_alone_holds_no_conversations(
    mixture: DataConfig, data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    text = MixtureSource(data.source, 1.0)
    config = replace(mixture, folder=str(tmp_path / "data"), mixture=(text,))
    assert config.conversations is not None  # as configs/data/mixture.yaml sets it
    assert mixture.with_conversations
    assert not config.with_conversations
    assert prepare(config, tokenizer_config).conversations is None
    batch = next(train_batches(config))
    np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids > 0)
