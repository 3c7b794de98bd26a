"""A tokenizer with byte fallback, and a tiny model for it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["the model learns the text of the books"] * 20, path, vocab_size=310)


@pytest.fixture(scope="session")
def model(toy_config: ModelConfig) -> Gemma2:
    """One pair of layers, and more rows than the tokenizer has tokens, as in Gemma's own checkpoints.

    Unmasked, the largest logit would be that of such a row almost always.
    """
    config = replace(toy_config, num_layers=2, vocab_size=320, vocab_padding=10)
    params = Gemma2.init(config, jax.random.key(0)).params()
    params["embedder"]["embedding"] *= jnp.where(jnp.arange(320) < 310, 1.0, 100.0)[:, None]
    return Gemma2(config, params)
