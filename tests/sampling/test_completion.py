"""Completions that grow: the same text and tokens as at once, why they end, and which sample is which."""

from dataclasses import replace

import pytest

from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.sampling.completion import Completion, Draw
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler

CONFIG = SamplingConfig(max_new_tokens=20, stop_tokens=(900, 901))


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return Sampler(model, tokenizer, ComputeConfig(unroll_layers=True))


def test_it_ends_with_a_stop_token_or_its_length(tokenizer):
    ids = tokenizer.encode("the books")
    stopped = Completion(tokenizer, {7}, SamplingConfig(max_new_tokens=100))
    stopped.push(ids[:2])
    assert (stopped.text, stopped.stop_reason) == (tokenizer.decode(ids[:2]), None)
    stopped.push([*ids[2:], 7])
    stopped.push([])
    assert (stopped.text, stopped.tokens) == ("the books", ids)
    assert str(stopped.stop_reason) == "stop"
    cut = Completion(tokenizer, {7}, SamplingConfig(max_new_tokens=1))
    cut.push(tokenizer.encode("🙂")[:1])
    assert (cut.text, cut.stop_reason) == ("\ufffd", "length")


def test_it_ends_with_a_stop_text(tokenizer):
    ids = tokenizer.encode("the books and the rest")
    row = Completion(tokenizer, {7}, SamplingConfig(max_new_tokens=100, stop_texts=(" and",)))
    row.push(ids)
    row.push([7])
    assert (row.text, row.tokens, row.stop_reason) == ("the books", ids, "stop")


def test_it_grows_to_what_is_generated_at_once(sampler):
    prompts = ["the model", "learns"]
    shown = [""] * 2
    for rows in sampler.complete(prompts, CONFIG):
        assert all(row.text.startswith(text) for row, text in zip(rows, shown, strict=True))
        shown = [row.text for row in rows]
    assert shown == sampler.generate(prompts, CONFIG)
    assert [row.stop_reason for row in rows] == ["length", "length"]


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(sampler):
    def drawn(prompts, config, draws=None):
        *_, rows = sampler.complete(prompts, config, draws)
        return [row.tokens for row in rows]

    one, other = "the model", "learns"
    together = drawn([one, one, other, other], CONFIG, [Draw(0, 0), Draw(0, 1), Draw(1, 0), Draw(1, 1)])
    assert drawn([one, other], CONFIG) == [together[0], together[2]]
    assert drawn([one, other], replace(CONFIG, seed=1)) == [together[1], together[3]]
    assert drawn([other], CONFIG, [Draw(1, 1)]) == [together[3]]
    assert together[0] != together[1]
