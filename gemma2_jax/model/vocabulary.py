"""Tokens and rows: an embedding may have more rows than there are tokens (`ModelConfig.vocab_padding`)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import Params


def check_tokens(config: ModelConfig, tokens: int, tokenizer: str) -> None:
    """Raises UserError unless the model has `tokens` tokens, as many as the tokenizer that `tokenizer` names."""
    if tokens != config.num_tokens:
        raise UserError(
            f"{tokenizer} has {tokens} tokens and the model {config.num_tokens}; model.vocab_size "
            f"({config.vocab_size}) minus model.vocab_padding ({config.vocab_padding}) must be the tokenizer's number."
        )


def without_padding(config: ModelConfig) -> ModelConfig:
    """The same model without padding rows in the embedding."""
    return replace(config, vocab_size=config.num_tokens, vocab_padding=0)


def resize_rows(params: Params, config: ModelConfig, rows: int) -> tuple[Params, ModelConfig]:
    """The same model with `rows` rows in its embedding: padding is cut off, or rows of zeros are appended.

    Args:
        params: laid out like `weight_specs(config)`; the embedding, an array or quantised, stays on its devices, with
            the same sharding.
        rows: a multiple of the mesh's tensor axis, if there is a mesh.

    Returns:
        The parameters and their config.

    Raises:
        UserError: tokens would be cut off.
    """
    if rows < config.num_tokens:
        raise UserError(
            f"an embedding of {config.num_tokens} tokens cannot be cut to {rows} rows; only padding can be cut off."
        )
    embedding = params["embedder"]["embedding"]

    def resize(table: jax.Array) -> jax.Array:
        kept = table[:rows]
        return jnp.pad(kept, ((0, rows - kept.shape[0]), (0, 0)))

    if rows != config.vocab_size:
        shardings = jax.tree.map(lambda part: part.sharding, embedding)
        embedding = jax.jit(partial(jax.tree.map, resize), out_shardings=shardings)(embedding)
    resized = replace(config, vocab_size=rows, vocab_padding=rows - config.num_tokens)
    return {**params, "embedder": {"embedding": embedding}}, resized
