"""Speculative decoding: the target's distribution exactly, the target's greedy tokens, and the predicted acceptance."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives import terms
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.decoding import row_keys
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.sampling.speculative import (
    Models,
    acceptance_probability,
    advance_speculation,
    begin_speculation,
    rejection_test,
    residual,
)
from tests.model.models import vivid
from tests.parameters import mostly_thorough

V = 5
CHOICES = [TokenChoice(1.0), TokenChoice(0.7, top_k=3), TokenChoice(1.5, top_p=0.8)]
NEVER = (900, 901)
GREEDY = SamplingConfig(max_new_tokens=55, temperature=0.0, stop_tokens=NEVER)
# Shorter than the window of 8 and far longer, in one batch.
PROMPTS = [[2, 40], [2, *range(30, 70)], [2, 9, 11, 13, 17, 19, 23, 29]]


@pytest.fixture(scope="module")
def tiny(toy_config):
    """A target and a draft of 5 tokens whose distributions differ, and overlap."""
    config = replace(toy_config, vocab_size=V, num_layers=2, d_model=16, sliding_window=4)
    params = vivid(config).params()
    params["embedder"]["embedding"] *= 0.8
    target = Gemma2(config, params)
    params = vivid(replace(config, num_layers=4)).params()
    params["embedder"]["embedding"] *= 0.3
    return target, Gemma2(replace(config, num_layers=4), params)


def distributions(model, choice, tokens):
    """P [B, T, V] of the token after each of `tokens` [B, T]."""
    return np.asarray(jax.nn.softmax(choice.distribution(jax.jit(model)(tokens)), axis=-1), np.float64)


def outcomes(
    p, q, text: tuple[int, ...], left: int, length: int, g: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every text of `length` tokens that the algorithm makes of `text`, with its probability, for each random outcome.

    Args:
        p, q: the target's and the draft's distributions, by the text before; left: proposals to be tested in this pass.
    """
    if len(text) == length:
        yield text, 1.0
        return
    of_p, of_q = jnp.array(p[text]), jnp.array(q[text] if left else np.zeros(V))
    kept = np.where(of_q > 0, of_q * acceptance_probability(of_p, jnp.where(of_q > 0, of_q, 1.0)), 0.0)
    correction = np.asarray(residual(of_p, of_q), np.float64)
    corrected = (1 - kept.sum()) * correction / correction.sum()
    for token in range(V):
        for weight, next_left in ((kept[token], left - 1), (corrected[token], g)):
            if weight > 0:
                for longer, rest in outcomes(p, q, (*text, token), next_left, length, g):
                    yield longer, weight * rest


@mostly_thorough("choice", CHOICES, ids=str)
def test_all_outcomes_add_up_to_the_targets_distribution(tiny, choice):
    """Every proposal, rejection and correction of 2 drafted tokens per pass, over all texts of 3 tokens."""
    texts = np.array(list(product(range(V), repeat=3)))
    prompt = np.full((len(texts), 1), 2)
    p, q = (
        {
            tuple(text[:length]): row[length]
            for text, row in zip(
                texts.tolist(), distributions(model, choice, np.hstack([prompt, texts])), strict=True
            )
            for length in range(3)
        }
        for model in tiny
    )
    found = dict.fromkeys(map(tuple, texts.tolist()), 0.0)
    for text, probability in outcomes(p, q, (), 0, 3, 2):
        found[text] += probability
    expected = {text: p[()][text[0]] * p[text[:1]][text[1]] * p[text[:2]][text[2]] for text in found}
    assert max(abs(found[text] - expected[text]) for text in found) < 1e-6
    assert 0.3 < np.minimum(p[()], q[()]).sum() < 0.95  # some proposals are accepted, and some rejected


@pytest.fixture(scope="module")
def sampled(tiny):
    """Calls return what the compiled programs give after a prompt of one token: passes, and texts [4096, 8]."""
    make = jax.jit(partial(Decoder, compute=ComputeConfig()))
    models = Models(make(tiny[0]), make(tiny[1]), draft_tokens=2)
    rows, new = 4096, 8

    @cache
    def sample(choice):
        keys, none = row_keys(jax.random.key(7), rows), jnp.array([9], jnp.int32)
        prompts, lengths = jnp.full((rows, 1), 2), jnp.ones(rows, jnp.int32)
        limits = lengths + new - 1

        @jax.jit
        def run(models):
            progress = begin_speculation(models, prompts, lengths, keys, none, limits, new + 3, choice)
            first = progress.tokens[:, 1]
            _, passes = advance_speculation(models, progress, keys, none, limits, new, new, choice)
            return first, passes

        first, passes = jax.device_get(run(models))
        is_kept = np.arange(3) < passes.kept[..., None]
        texts = [[one, *row[kept]] for one, row, kept in zip(first, passes.tokens, is_kept, strict=True)]
        return passes, np.array(texts)

    return sample


@mostly_thorough("choice", CHOICES, ids=str)
def test_samples_follow_the_targets_joint_distribution(tiny, sampled, choice):
    """Pearson's chi-square over all beginnings of 3 tokens, within four standard deviations of its mean."""
    _, texts = sampled(choice)
    cells = np.array(list(product(range(V), repeat=3)))
    p = distributions(tiny[0], choice, np.hstack([np.full((len(cells), 1), 2), cells]))
    joint = np.prod([p[np.arange(len(cells)), place, cells[:, place]] for place in range(3)], axis=0)
    counts = np.bincount(texts[:, :3] @ [V * V, V, 1], minlength=V**3)
    possible = joint > 0
    assert counts[~possible].sum() == 0
    expected = len(texts) * joint[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    # The variance of Pearson's statistic; rare texts add to that of the chi-square distribution.
    variance = 2 * freedom + ((1 / joint[possible]).sum() - (freedom + 1) ** 2 - 2 * freedom) / len(texts)
    assert abs(chi_square - freedom) < 4 * np.sqrt(variance)


@mostly_thorough("choice", CHOICES, ids=str)
def test_acceptance_is_the_predicted_one(tiny, sampled, choice):
    """1 less the total variation at the tested positions, of the very texts; four standard deviations."""
    passes, texts = sampled(choice)
    tokens = np.hstack([np.full((len(texts), 1), 2), texts[:, :-1]])
    target, draft = (choice.distribution(jax.jit(model)(tokens)) for model in tiny)
    predicted = np.asarray(terms.acceptance(draft, target))
    starts = 1 + np.cumsum(passes.kept, axis=1) - passes.kept
    row, number_of_pass = np.nonzero(passes.tested)
    first = starts[row, number_of_pass]
    second = passes.tested[row, number_of_pass] == 2
    alpha = np.concatenate([predicted[row, first], predicted[row[second], first[second] + 1]])
    assert len(alpha) == passes.tested.sum() > 10_000
    assert 0.3 < alpha.mean() < 0.95
    assert abs(passes.accepted.sum() - alpha.sum()) < 4 * np.sqrt((alpha * (1 - alpha)).sum())


def test_equal_distributions_and_impossible_proposals():
    keys = jax.random.split(jax.random.key(0), (200, 3))
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -jnp.inf, 2.0]), (200, 3, 4))
    proposed = jnp.broadcast_to(jnp.array([1, 3]), (200, 2))
    accepted, drawn = rejection_test(TokenChoice(1.0), logits, logits[:, :2], proposed, keys)
    assert accepted.tolist() == [2] * 200
    assert set(drawn.tolist()) == {0, 1, 3}
    uniform = jnp.zeros((200, 2, 4))
    accepted, drawn = rejection_test(TokenChoice(1.0), logits, uniform, jnp.full((200, 2), 2), keys)
    assert accepted.tolist() == [0] * 200
    assert set(drawn.tolist()) <= {1, 3}  # those with more probability than the draft gives
    accepted, drawn = rejection_test(
        TokenChoice(1.0), logits.at[:, 0, 0].set(jnp.nan), uniform, proposed, keys
    )
    assert (accepted.tolist(), drawn.tolist()) == ([0] * 200, [4] * 200)


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    return Sampler(model, tokenizer).generate_tokens(PROMPTS, GREEDY)


def drafts(model):
    """By name: the model itself, one of another size without its padding, and one that always proposes the same."""
    config = replace(
        model.config, num_layers=4, d_model=16, sliding_window=4, vocab_size=310, vocab_padding=0
    )
    params = jax.tree.map(jnp.zeros_like, vivid(config).params())
    return {
        "itself": model,
        "smaller": vivid(config),
        "constant": Gemma2(config, params),
    }


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "number"), [("smaller", 3), ("itself", 4), ("constant", 1), ("itself", 7), ("smaller", 1)]
)
def test_greedy_tokens_are_the_models(model, tokenizer, greedy, name, number):
    """A batch of prompts of different lengths, continued across the windows of both models."""
    draft = drafts(model)[name]
    sampler = Sampler(model, tokenizer, draft=draft, draft_tokens=number)
    assert sampler.generate_tokens(PROMPTS, GREEDY) == greedy
    found = sampler.draft_statistics
    assert found.tokens == 3 * 54
    assert found.accepted <= found.tested <= number * found.passes
    if name == "itself":
        assert found.acceptance == 1.0
        assert found.passes == 3 * -(-54 // (number + 1))
    else:
        assert found.tokens_per_pass < number + 1


@pytest.mark.thorough
def test_greedy_tokens_with_a_cache_in_eight_bits(model, tokenizer):
    """The draft has such a cache too. Neither accepted nor rejected tokens leave a trace in them."""
    plain = Sampler(model, tokenizer, quantize_cache="int8").generate_tokens(PROMPTS, GREEDY)
    for name, is_the_same in (("itself", True), ("smaller", False)):
        sampler = Sampler(model, tokenizer, draft=drafts(model)[name], draft_tokens=3, quantize_cache="int8")
        assert sampler.generate_tokens(PROMPTS, GREEDY) == plain
        assert (sampler.draft_statistics.acceptance == 1.0) is is_the_same


@pytest.mark.thorough
def test_rows_stop_at_their_own_tokens(model, tokenizer, greedy):
    draft = drafts(model)["itself"]
    sampler = Sampler(model, tokenizer, draft=draft, draft_tokens=4)
    stop = next(token for token in greedy[0] if token not in greedy[1] + greedy[2])
    found = sampler.generate_tokens(PROMPTS, replace(GREEDY, stop_tokens=(stop, 900)))
    assert found == [greedy[0][: greedy[0].index(stop) + 1], *greedy[1:]]
    short = replace(GREEDY, max_new_tokens=1)
    assert sampler.generate_tokens(PROMPTS, short) == [row[:1] for row in greedy]


@pytest.mark.thorough
def test_a_row_samples_the_same_alone_and_in_a_batch(model, tokenizer):
    sampler = Sampler(model, tokenizer, draft=drafts(model)["smaller"], draft_tokens=3)
    config = replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)
    together = sampler.generate_tokens(PROMPTS, config)
    assert sampler.generate_tokens(PROMPTS[:1], config) == together[:1]
    assert sampler.generate_tokens(PROMPTS, config) == together
    assert "".join(sampler.stream("the model", config)) == sampler.generate(["the model"], config)[0]


@pytest.mark.thorough
def test_more_drafts_than_tokens_to_come_are_not_proposed(model, tokenizer, greedy):
    sampler = Sampler(model, tokenizer, draft=drafts(model)["itself"], draft_tokens=10**20)
    assert sampler.generate_tokens(PROMPTS, GREEDY) == greedy
    assert sampler.draft_statistics.passes == len(PROMPTS)


def test_other_tokenizers_and_numbers_are_refused(model, tokenizer):
    other = Gemma2(replace(model.config, vocab_padding=9), model.params())
    with pytest.raises(UserError, match=r"^The draft has 311 tokens and the model 310; a draft must have"):
        Sampler(model, tokenizer, draft=other)
    with pytest.raises(UserError, match=r"^draft_tokens is 0; it must be at least 1\.$"):
        Sampler(model, tokenizer, draft=model, draft_tokens=0)


def test_other_formats_of_the_cache_are_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"^quantize_cache is 'int4'; it must be 'int8', or None"):
        Sampler(model, tokenizer, quantize_cache="int4")
