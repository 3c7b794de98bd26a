"""Perplexity and bits per byte of text and of prepared data, against a forward pass for each single token."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import load_model
from gemma2_jax.config import UserError, build, read_json
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import stored_documents, validation_batches
from gemma2_jax.data.shards import read_data_manifest
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.evaluation import evaluate as evaluate_module
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.evaluate import evaluate
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.evaluation.evaluated_model import EvaluatedModel
from gemma2_jax.evaluation.record import EvaluationRecord
from gemma2_jax.evaluation.scores import Scores
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from tests.model.models import vivid
from tests.parameters import mostly_thorough

CONTEXT, STRIDE = 24, 7


@pytest.fixture(scope="module")
def files(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Two domains, the second with characters of several bytes; the documents of each JSONL file, by its path."""
    folder = tmp_path_factory.mktemp("text")
    chosen = {
        folder / "plain.jsonl": [text[:500] for text in texts[:6]],
        folder / "other.jsonl": [f"naïve façade ▁ — {text[:90]} <start_of_turn> 漢字" for text in texts[6:9]],
    }
    for path, documents in chosen.items():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return {str(path): documents for path, documents in chosen.items()}


def nats_of(model: Gemma2, tokenizer: Tokenizer, documents: list[str], stride: int) -> tuple[float, int]:
    """Sum of -log P over all tokens, each from a forward pass of its own; and the number of tokens."""
    rows, last, targets = [], [], []
    for document in documents:
        ids = tokenizer.encode(document)
        for i, token in enumerate(ids):
            window = 0 if i < CONTEXT else -(-(i - CONTEXT + 1) // stride)
            inputs = [tokenizer.bos_id, *ids[window * stride : i]]
            last.append(len(inputs) - 1)
            targets.append(token)
            rows.append(inputs + [0] * (CONTEXT - len(inputs)))
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model)(jnp.array(rows)), np.float64)[np.arange(len(rows)), last]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(rows)), targets].sum(), len(rows)


def close(found: Scores, nats: float, tokens: int, size: int) -> None:
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.usefixtures("one_device")
def test_text_equals_a_forward_pass_for_each_token(
    student: str, files: dict[str, list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = [f"{Path(path).stem}={path}" for path in files]
    model = load_model(student)
    for windows, stride in (("document", CONTEXT), ("sliding", STRIDE)):
        config = EvaluationConfig(
            text=text,
            windows=windows,
            context=CONTEXT,
            stride=STRIDE if windows == "sliding" else None,
            batch=3,
        )
        record = evaluate(student, config)
        scores = record.rows[0].scores[windows]
        all_nats, all_tokens, all_bytes = 0.0, 0, 0
        for path, documents in files.items():
            size = sum(len(document.encode()) for document in documents)
            nats, tokens = nats_of(model, tokenizer, documents, stride)
            close(scores.domains[Path(path).stem], nats, tokens, size)
            all_nats, all_tokens, all_bytes = all_nats + nats, all_tokens + tokens, all_bytes + size
        close(scores.total, all_nats, all_tokens, all_bytes)
        assert (record.windows, record.context, record.stride) == (windows, CONTEXT, stride)
    record.save(tmp_path / "record.json")
    assert build(EvaluationRecord, read_json(tmp_path / "record.json"), "it") == record


@mostly_thorough("window", [3, None])
@pytest.mark.usefixtures("one_device")
def test_another_window_is_that_of_a_model_that_has_it(
    toy_run: RunConfig,
    write_toy_run: Callable[[Path, Gemma2], str],
    files: dict[str, list[str]],
    tmp_path: Path,
    window: int | None,
) -> None:
    """Of a model with 3 local layers for each global one; without windows, it has no such ratio."""
    model = vivid(replace(toy_run.model, num_layers=4, global_every=2))
    sizes = replace(model.config, sliding_window=window, global_every=2 if window else 1)
    run = write_toy_run(tmp_path / "run", model)
    other = write_toy_run(tmp_path / "other", Gemma2(sizes, model.params()))
    config = EvaluationConfig(text=list(files)[:1], context=CONTEXT, batch=3, teacher=run)
    (found,) = evaluate(run, replace(config, sliding_window=window)).rows
    (expected,) = evaluate(other, config).rows
    assert found.scores == expected.scores
    kl = found.scores["document"].total.kl
    assert kl is not None
    assert kl > 1e-3  # from the teacher, which keeps its window
    assert found.name == f"{run} with windows of 3" if window else f"{run} without windows"
    assert (found.checkpoint.sliding_window, expected.checkpoint.sliding_window) == (window, "checkpoint")


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_packed_windows_are_the_validation_of_training(student: str, data: DataConfig) -> None:
    found = evaluate(student).rows[0].scores["packed"]
    model, nats, tokens = jax.jit(load_model(student)), 0.0, 0
    for batch in validation_batches(data):
        logits = model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)))
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        inside = batch.segment_ids > 0
        nats -= np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0][inside].sum()
        tokens += inside.sum()
    close(found.total, nats, int(tokens), read_data_manifest(data.folder).validation.bytes)
    assert list(found.domains) == [data.source]
    of_run = evaluate_run(student)
    assert found.total.cross_entropy == pytest.approx(of_run.cross_entropy, rel=1e-6)
    assert found.total.entropy == pytest.approx(of_run.entropy, rel=1e-6)


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_prepared_documents_are_scored_like_their_text(
    student: str, data: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The held-out documents as text and from the prepared folder, all and the first three."""
    documents = [tokenizer.decode(map(int, each)) for each in stored_documents(data, "validation")]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for limit in (None, 3):
        settings: dict[str, Any] = dict(windows="sliding", context=CONTEXT, stride=STRIDE, limit=limit)
        stored, read = (
            evaluate(student, EvaluationConfig(**settings, **where)).rows[0].scores["sliding"].total
            for where in ({"data": data.folder}, {"text": [str(path)]})
        )
        assert (stored.tokens, stored.bytes) == (read.tokens, read.bytes)
        assert stored.bytes == sum(len(text.encode()) for text in documents[:limit])
        assert stored.nats == pytest.approx(read.nats, rel=1e-6)


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_a_teacher_an_adapter_and_several_checkpoints(
    student: str, teacher: str, files: dict[str, list[str]], conversations: DataConfig
) -> None:
    config = EvaluationConfig(text=list(files), context=CONTEXT, teacher=teacher, memorisation=2)
    record = evaluate([student, teacher], config)
    ours, theirs = (row.scores["document"].total for row in record.rows)
    assert theirs.agreement == 1.0
    assert theirs.acceptance == pytest.approx(1.0)
    assert theirs.kl == pytest.approx(0, abs=1e-6)
    assert ours.kl is not None
    assert ours.kl > 0.01
    assert ours.teacher_entropy == pytest.approx(theirs.entropy, rel=1e-5)
    first, second = record.rows
    assert record.teacher == second.checkpoint
    assert first.checkpoint.identity != second.checkpoint.identity
    assert first.memorisation is not None
    assert first.memorisation.total.documents == sum(
        each.documents for each in first.memorisation.domains.values()
    )
    on_chats = evaluate(student, EvaluationConfig(data=conversations.folder, windows="document", context=64))
    lengths = read_data_manifest(conversations.folder).validation_lengths
    assert on_chats.rows[0].scores["document"].total.tokens == lengths.loss_tokens


@pytest.fixture
def other_tokenizer(
    toy_run: RunConfig, write_toy_run: Callable[[Path, Gemma2], str], texts: list[str], tmp_path: Path
) -> str:
    """A run whose tokenizer is not that of the data."""
    folder = write_toy_run(
        tmp_path / "other", Gemma2.init(replace(toy_run.model, vocab_size=320), jax.random.key(0))
    )
    train_tokenizer(texts, f"{folder}/tokenizer.model", 320)
    return folder


def test_mistakes_are_refused_before_weights_are_read(
    student: str,
    teacher: str,
    other_tokenizer: str,
    files: dict[str, list[str]],
    toy_run: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EvaluatedModel, "load", lambda *_: pytest.fail("weights are about to be read"))
    # All devices, also after tests of this module that take one.
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices())
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n")
    path = next(iter(files))

    def refused(match: str, checkpoints: Any, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            evaluate(checkpoints, EvaluationConfig(**settings))

    refused("windows is 'slide', did you mean sliding", student, windows="slide", text=[path])
    refused("windows is packed, which takes", student, windows="packed", text=[path])
    refused("are both set", student, text=[path], data="data")
    refused("only evaluation.windows=sliding uses", student, text=[path], stride=4)
    refused("must be lists", student, text=path)
    refused("memorisation is -1", student, memorisation=-1)
    refused("There is no checkpoint", [])
    refused("is given 2 times", [student, student])
    refused("belong to one checkpoint", [student, teacher], adapters=["a"])
    refused("no_run does not exist", str(tmp_path / "no_run"))
    refused("holds no adapter", student, adapters=[teacher])
    refused("stride is 9; it must be at most evaluation.context", student, text=[path], windows="sliding",
            stride=9, context=8)  # fmt: skip
    refused("evaluation.text 'no/such' matches no file", student, text=["no/such"])
    refused("holds no text", student, text=[str(blank)])
    refused("2 domains with the name a", student, text=[f"a={path}", f"a={blank}"])
    refused("has the tokenizer .* was prepared", other_tokenizer, data=toy_run.data.folder)
    refused("only models with the same tokenizer", other_tokenizer, text=[path], teacher=teacher)
    refused("is not prepared", student, data=str(tmp_path))


def test_a_checkpoint_without_data_needs_some(toy_run: RunConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "run", toy_run.model, vivid(toy_run.model).params(), Path(toy_run.tokenizer.path))
    with pytest.raises(UserError, match="has no validation data of its own"):
        evaluate(tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_documents_without_a_token_to_score_are_refused(
    student: str, files: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "windows_of", lambda *_: iter(()))
    with pytest.raises(UserError, match="holds no token that is to be scored"):
        evaluate(student, EvaluationConfig(text=list(files), context=CONTEXT))
