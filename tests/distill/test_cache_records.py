"""Entries become bytes and come back: exactly, or within the error that the grid states."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.distill.cache.encoding import EncodingConfig, Entries
from gemma2_jax.distill.cache.records import LogGrid, Packer, log_grid, row_checksums
from gemma2_jax.kernels.softcap import NEVER
from gemma2_jax.model.config import ModelConfig

MODEL = ModelConfig(256_000, 2, 8, 1, 1, 8, 8, None, 8.0)


def packer(config: EncodingConfig, num_tokens: int, seq_len: int) -> Packer:
    return Packer(config, log_grid(config, replace(MODEL, vocab_size=num_tokens)), num_tokens, seq_len)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.sampled_from([1, 2, 255, 256, 257, 65_536, 65_537, 256_000]),
    draws=st.sampled_from([1, 2, 12, 255, 256, 257, 300]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    distinct=st.integers(1, 300),
)
def test_draws_come_back_as_they_were(
    seed: int, num_tokens: int, draws: int, shape: tuple[int, int], distinct: int
) -> None:
    rows, seq_len = shape
    random = np.random.default_rng(seed)
    pool = random.integers(0, num_tokens, distinct)
    ids = np.sort(random.choice(pool, (rows, seq_len, draws)), axis=-1).astype(np.int32)
    tool = packer(EncodingConfig(entries=draws), num_tokens, seq_len)
    packed = [tool.pack(Entries(row, None, None), number) for number, row in enumerate(ids)]
    largest = max(each.largest for each in packed)
    sparse, checksums = tool.unpack([each.record for each in packed], largest)
    assert checksums == list(range(rows))
    assert sparse.ids.shape == (rows, seq_len, largest)
    for token, found, logs in zip(
        ids.reshape(-1, draws),
        sparse.ids.reshape(-1, largest),
        sparse.log_weights.reshape(-1, largest),
        strict=True,
    ):
        expected, counts = np.unique(token, return_counts=True)
        used = logs > NEVER
        assert np.array_equal(found[used], expected)
        assert np.array_equal(np.round(np.exp(logs[used].astype(float)) * draws), counts)
        np.testing.assert_allclose(logs[used], np.log(counts / draws), rtol=1e-6)
        assert np.all(found[~used] == 0)
        assert np.all(np.exp(logs[~used]) == 0)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["top_k", "top_p", "full"]),
    bits=st.integers(8, 16),
    k=st.integers(1, 40),
    scale=st.floats(0.1, 12.0),
)
def test_logarithms_come_back_within_a_step(seed: int, kind: str, bits: int, k: int, scale: float) -> None:
    num_tokens, seq_len = 40, 3
    random = np.random.default_rng(seed)
    logits = np.clip(random.normal(size=(seq_len, num_tokens)) * scale, -30, 30)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = num_tokens if kind == "full" else k
    config = {
        "top_k": EncodingConfig("top_k", k, weight_bits=bits),
        "top_p": EncodingConfig("top_p", k, p=0.9, weight_bits=bits),
        "full": EncodingConfig("full", None, weight_bits=bits),
    }[kind]
    ids = np.sort(np.argsort(-log_p, axis=-1)[:, :kept], axis=-1)
    logs = np.take_along_axis(log_p, ids, axis=-1)
    numbers = random.integers(1, kept + 1, seq_len) if kind == "top_p" else np.full(seq_len, kept)
    unused = np.arange(kept) >= numbers[:, None]
    ids, logs = np.where(unused, num_tokens, ids), np.where(unused, -np.inf, logs)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(1 - np.exp(logs).sum(-1), 0))
    tool = packer(config, num_tokens, seq_len)
    tail = log_tail if config.has_tail else None
    packed = tool.pack(Entries(ids.astype(np.int32), logs.astype(np.float32), tail), 7)
    assert packed.largest == numbers.max()
    sparse, _ = tool.unpack([packed.record], packed.largest)
    step = log_grid(config, replace(MODEL, vocab_size=num_tokens)).step
    for token in range(seq_len):
        used = slice(numbers[token])
        assert np.array_equal(sparse.ids[0, token, used], ids[token, used])
        assert np.abs(sparse.log_weights[0, token, used] - logs[token, used]).max() <= step + 1e-4
        assert np.all(sparse.log_weights[0, token, numbers[token] :] < NEVER / 2)
        if config.has_tail and log_tail[token] > -10:
            assert abs(np.log(sparse.tail[0, token]) - log_tail[token]) <= step + 1e-4
    total = np.exp(sparse.log_weights.astype(float)).sum(-1) + sparse.tail
    np.testing.assert_allclose(total, 1, atol=1e-5)


@given(st.integers(8, 16), st.floats(-100, 0), st.floats(0.1, 20), st.floats(0, 1))
def test_the_grid_is_off_by_half_a_step_at_most(bits: int, low: float, width: float, at: float) -> None:
    grid = LogGrid(low, low + width, bits)
    value = low + at * width
    code = grid.codes(np.array([value]))
    assert code.dtype == np.uint16
    assert code[0] < 1 << bits
    # Besides, float32 has 24 bits for a logarithm of up to 100. The difference itself is not rounded to float32.
    assert abs(float(grid.logs()[code[0]]) - value) <= 0.5 * grid.step * (1 + 1e-6) + 100 * 2.0**-24
    assert grid.codes(np.array([-np.inf, np.inf])).tolist() == [0, (1 << bits) - 1]


@pytest.mark.parametrize("proposal_temperature", [1.0, 1.25, 4.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
def test_the_grids_range_holds_all_that_can_be(proposal_temperature: float, temperature: float) -> None:
    """Extreme logits within the soft cap: all alike, one far above, or one far below the others."""
    size = 1000
    model = replace(MODEL, vocab_size=size)
    sampled = EncodingConfig(proposal_temperature=proposal_temperature, temperature=temperature)
    whole = EncodingConfig("top_k", 8, temperature=temperature)
    for one, others in ((0, 0), (30, -30), (-30, 30)):
        logits = np.full(size, float(others))
        logits[0] = one

        def log_softmax(values: np.ndarray) -> np.ndarray:
            shifted = values - values.max()
            return np.asarray(shifted - np.log(np.exp(shifted).sum()))

        log_p = log_softmax(logits / temperature)
        log_q = log_softmax(logits / temperature / proposal_temperature)
        for config, values in ((whole, log_p), (sampled, log_p - log_q)):
            grid = log_grid(config, model)
            assert grid.low - 1e-9 <= values.min()
            assert values.max() <= grid.high + 1e-9


def test_the_default_error_is_small() -> None:
    """At Gemma's vocabulary, of a weight with 12 bits: under 1 %, or 2 % where weights are brought to 1."""
    grid = log_grid(EncodingConfig("top_k", 50), MODEL)
    assert math.exp(grid.step / 2) - 1 < 0.01
    assert math.exp(grid.step) - 1 < 0.02


def test_a_truncated_record_is_reported() -> None:
    tool = packer(EncodingConfig(entries=4), 1000, 2)
    record = tool.pack(Entries(np.array([[1, 1, 2, 3], [5, 5, 5, 5]], np.int32), None, None), 0).record
    for broken in (record[:-1], record[:6], record[:4], record[:-8] + b"12345678"):
        with pytest.raises(UserError, match="holds a damaged record"):
            tool.unpack([broken], 3)
    with pytest.raises(UserError, match="holds a damaged record"):
        tool.unpack([record], 2)  # more entries than there is room for


def test_a_rows_checksum_is_of_its_tokens_and_documents() -> None:
    tokens, segments = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.int32)
    first, second = row_checksums(Batch(tokens, tokens, tokens, segments, segments))
    assert first != second
    assert row_checksums(Batch(tokens, segments, segments, segments, segments)) == [first, second]
    assert row_checksums(Batch(tokens[:, ::-1], tokens, tokens, segments, segments))[0] != first
    assert row_checksums(Batch(tokens, tokens, tokens, segments * 2, segments))[0] != first
