"""Scores of continuations against an independent computation from all logits, and the windows of long texts."""

import random
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.config import UserError
from gemma2_jax.evaluation.continuations import (
    ContinuationScorer,
    ScoredText,
    continuation_window,
    rolling_windows,
    scores_of_tokens,
)
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.model.models import vivid
from tests.programs import arrays

BOS = 2


@given(length=st.integers(0, 60), max_length=st.integers(2, 20))
def test_rolling_windows_score_each_token_once(length: int, max_length: int) -> None:
    tokens = list(range(10, 10 + length))
    windows = rolling_windows(tokens, BOS, max_length)
    scored = [token for window in windows for token in window.tokens[len(window.tokens) - window.scored :]]
    assert scored == tokens
    for number, window in enumerate(windows):
        assert window.tokens.count(BOS) == 1
        assert window.tokens[0] == BOS
        assert len(window.tokens) == max_length + 1 or len(windows) == 1
        assert len(window.tokens) - window.scored == (1 if number == 0 else 2) or number == len(windows) - 1


def test_a_long_context_loses_its_beginning_but_not_bos() -> None:
    context = [BOS, *range(10, 30)]
    window = continuation_window(context, [50, 51, 52], 8)
    assert window == ScoredText([BOS, *range(25, 30), 50, 51, 52], 3)
    assert continuation_window(context, [50], 30) == ScoredText([*context, 50], 1)
    assert continuation_window([BOS, 10], [50, 51], 2) == ScoredText([BOS, 50, 51], 2)
    with pytest.raises(UserError, match="an answer has 4 tokens, but the context only 3"):
        continuation_window(context, [1, 2, 3, 4], 3)


@pytest.fixture(scope="module")
def model(toy_config: ModelConfig) -> Gemma2:
    return vivid(toy_config)


def some_windows(count: int, seed: int = 0) -> list[ScoredText]:
    """Windows of several lengths; the model's own choice is the answer of some, and many share their beginning."""
    draw = random.Random(seed)
    contexts = [[BOS, *draw.choices(range(5, 97), k=draw.choice([1, 6, 14, 22]))] for _ in range(4)]
    answers = [draw.choices(range(5, 97), k=draw.choice([1, 1, 2, 5])) for _ in range(count)]
    return [ScoredText([*draw.choice(contexts), *answer], len(answer)) for answer in answers]


def expected(model: Gemma2, windows: Sequence[ScoredText]) -> tuple[list[float], list[bool]]:
    """From all logits of each window by itself, without batches or padding after its tokens' bucket."""
    run = jax.jit(model)
    log_probs, greedy = [], []
    for window in windows:
        inputs = np.zeros((1, 32), np.int32)
        inputs[0, : len(window.tokens) - 1] = window.tokens[:-1]
        logits = np.asarray(run(jnp.asarray(inputs))[0, : len(window.tokens) - 1], np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = np.arange(len(window.tokens) - 1)[len(window.tokens) - 1 - window.scored :]
        targets = np.array(window.tokens[1:])[places]
        log_probs.append(float(logits[places, targets].sum()))
        greedy.append(bool((logits[places].argmax(axis=-1) == targets).all()))
    return log_probs, greedy


def with_greedy_answers(model: Gemma2, windows: Sequence[ScoredText]) -> list[ScoredText]:
    """Each window, and one whose last token is the model's own choice."""
    run = jax.jit(model)
    found = []
    for window in windows:
        inputs = np.zeros((1, 32), np.int32)
        inputs[0, : len(window.tokens) - 1] = window.tokens[:-1]
        choice = int(run(jnp.asarray(inputs))[0, len(window.tokens) - 2].argmax())
        found += [window, ScoredText([*window.tokens[:-1], choice], 1)]
    return found


def test_scores_equal_those_of_all_logits(model: Gemma2) -> None:
    windows = with_greedy_answers(model, some_windows(13))
    log_probs, greedy = expected(model, windows)
    scores = ContinuationScorer(model, ComputeConfig(), batch_size=3).score(windows)
    np.testing.assert_allclose([score.log_prob for score in scores], log_probs, rtol=2e-5, atol=2e-5)
    assert [score.is_greedy for score in scores] == greedy
    assert len(set(greedy)) == 2


def test_texts_that_begin_another_share_its_row(model: Gemma2) -> None:
    """Answers of one token to one question are scored in one row, and so is a question that another one extends."""
    scorer, done = ContinuationScorer(model, ComputeConfig(), batch_size=1), list[int]()
    question = [BOS, *range(10, 20)]
    windows = [ScoredText([*question, answer], 1) for answer in range(30, 34)]
    windows += [ScoredText([*question, 33, 34], 1), ScoredText([BOS, 11, 12], 2)]
    scores = scorer.score(windows, done.append)
    assert done == [5, 6]
    log_probs, _ = expected(model, windows)
    np.testing.assert_allclose([score.log_prob for score in scores], log_probs, rtol=2e-5, atol=2e-5)


def test_longer_answers_to_one_question_are_branches_of_its_row(model: Gemma2) -> None:
    """The question is longer than the sliding window, and one answer needs no branch."""
    scorer, done = ContinuationScorer(model, ComputeConfig(), batch_size=1), list[int]()
    question = [BOS, *range(10, 23)]
    answers = [[30, 31], [30, 32, 33], [40, 41, 42, 43, 44], [50]]
    windows = [ScoredText([*question, *answer], len(answer)) for answer in answers]
    scores = scorer.score(windows, done.append)
    assert done == [4]
    log_probs, _ = expected(model, windows)
    np.testing.assert_allclose([score.log_prob for score in scores], log_probs, rtol=2e-5, atol=2e-5)


def test_many_answers_to_a_short_question(model: Gemma2) -> None:
    """More than a batch has positions."""
    windows = [ScoredText([BOS, answer], 1) for answer in range(5, 97)]
    scores = ContinuationScorer(model, ComputeConfig(), batch_size=2).score(windows)
    log_probs, _ = expected(model, windows)
    np.testing.assert_allclose([score.log_prob for score in scores], log_probs, rtol=2e-5, atol=2e-5)


def test_nothing_to_score(model: Gemma2) -> None:
    scorer = ContinuationScorer(model, ComputeConfig(), batch_size=2)
    assert scorer.score([]) == []
    [score] = scorer.score(rolling_windows([], BOS, 16))
    assert score.log_prob == 0.0


def test_weights_that_are_not_numbers_are_refused(toy_config: ModelConfig) -> None:
    params = Gemma2.init(toy_config, jax.random.key(0)).params()
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * jnp.nan
    scorer = ContinuationScorer(Gemma2(toy_config, params), ComputeConfig(), batch_size=2)
    with pytest.raises(UserError, match="log-probabilities are NaN"):
        scorer.score([ScoredText([BOS, 5], 1)])


def test_there_is_no_array_over_all_tokens_and_the_vocabulary(model: Gemma2) -> None:
    ids = jnp.zeros(8 * 64, jnp.int32)
    program = partial(scores_of_tokens, compute=ComputeConfig())
    branches = jnp.zeros((16, 16), jnp.int32), ids[:16], ids[:16]
    jaxpr = jax.make_jaxpr(program)(model, ids.reshape(8, 64), *branches, ids, ids, jnp.int32(500))
    D, V = model.config.d_model, model.config.vocab_size
    assert max(size for shape, size in arrays(jaxpr.jaxpr) if V in shape and D not in shape) <= 128 * V


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [MeshConfig(4, 2, 1), MeshConfig(1, 4, 2), MeshConfig(2, 2, 1, 2)], ids=str)
def test_scores_on_a_mesh(axes: MeshConfig, toy_config: ModelConfig, model: Gemma2) -> None:
    from dataclasses import replace

    from gemma2_jax.model.weights import abstract_params, weight_specs

    config = replace(toy_config, vocab_size=104, vocab_padding=7)  # a multiple of the devices that split it
    params = model.params()
    params["embedder"]["embedding"] = jnp.pad(params["embedder"]["embedding"], ((0, 7), (0, 0)))
    windows = some_windows(30)
    log_probs, greedy = expected(model, windows)
    mesh = build_mesh(axes)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(weight_specs(config), mesh=mesh))
        split = Gemma2(config, jax.device_put(params, shardings))
        scores = ContinuationScorer(split, ComputeConfig(), 5, mesh).score(windows)
    np.testing.assert_allclose([score.log_prob for score in scores], log_probs, rtol=1e-4, atol=1e-4)
    assert [score.is_greedy for score in scores] == greedy
