"""Sizes of the published models, from their config files, without a byte of their weights."""

from pathlib import Path

import jax
import pytest

from gemma2_jax.config import load_config
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters, forward_flops_per_token, training_flops_per_token
from gemma2_jax.model.transformer import Gemma2

MODELS = Path(__file__).parents[2] / "configs" / "model"

# The Gemma 2 report, table 2: embedding and other parameters.
PUBLISHED = {
    "gemma2_2b": (590_118_912, 2_024_517_888),
    "gemma2_9b": (917_962_752, 8_324_201_984),
    "gemma2_27b": (1_180_237_824, 26_047_480_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    config = load_config(ModelConfig, MODELS / f"{name}.yaml")
    counts = count_parameters(config)
    assert (config.vocab_size, config.num_tokens) == (256_128, 256_000)  # the report counts all rows
    assert (counts.embedding, counts.non_embedding) == PUBLISHED[name]
    assert counts.total == sum(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_itself_has_as_many(name):
    config = load_config(ModelConfig, MODELS / f"{name}.yaml")
    model = jax.eval_shape(lambda: Gemma2.init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == sum(PUBLISHED[name])


def test_flops_of_one_token(toy_config):
    """By hand: 2 for each weight, 4 N H for each score; of 16 tokens a global layer sees 1 .. 16, a local 1 .. 8."""
    weights = count_parameters(toy_config).total
    scores = 2 * sum(range(1, 17)) / 16 + 2 * (sum(range(1, 9)) + 8 * 8) / 16
    assert forward_flops_per_token(toy_config, 16) == pytest.approx(2 * weights + 4 * 4 * 8 * scores)


def test_a_teacher_costs_its_forward_pass(toy_config):
    alone = training_flops_per_token(toy_config, 16)
    forward = forward_flops_per_token(toy_config, 16)
    assert alone == 3 * forward
    assert training_flops_per_token(toy_config, 16, teacher=toy_config) == 4 * forward
