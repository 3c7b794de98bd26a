"""Models that show more than freshly initialised ones, and Gemma 2's proportions at a size for tests."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gemma2_jax.config import read_yaml
from gemma2_jax.formats.layouts import HUGGINGFACE, expand
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs

RELEASED = ("2b", "9b", "27b")
CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def vivid(config: ModelConfig, size: float = 1.0) -> Gemma2:
    """A model whose norms are not the identity; a larger `size` makes logits that reach both soft caps."""
    params = Gemma2.init(config, jax.random.key(0)).params()
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(structure, noisy)
    for kind in ("local_block", "global_block"):
        params["pairs"][kind]["attention"]["query"] *= size
    params["final_norm"]["scale"] = (1 + params["final_norm"]["scale"]) * size - 1
    return Gemma2(config, params)


def released(name: str) -> ModelConfig:
    """A released size: "2b", "9b" or "27b"."""
    return ModelConfig(**read_yaml(CONFIGS / f"gemma2_{name}.yaml"))


def shrunk(name: str, num_heads: int, head_dim: int) -> ModelConfig:
    """A released size in its proportions, with four layers and a window of 8.

    The 27B's query scale keeps apart from head_dim: it is d_model / num_heads, there as here.
    """
    whole = released(name)
    factor = num_heads * head_dim / (whole.num_heads * whole.head_dim)
    config = replace(
        whole,
        vocab_size=64,
        vocab_padding=0,
        num_layers=4,
        d_model=round(whole.d_model * factor),
        num_heads=num_heads,
        num_kv_heads=num_heads * whole.num_kv_heads // whole.num_heads,
        head_dim=head_dim,
        d_ff=round(whole.d_ff * factor),
        sliding_window=8,
        query_pre_attn_scalar=whole.query_pre_attn_scalar * head_dim // whole.head_dim,
    )
    assert config.d_model * whole.head_dim * whole.num_heads == whole.d_model * num_heads * head_dim
    assert config.query_pre_attn_scalar * whole.head_dim == whole.query_pre_attn_scalar * head_dim
    return config


def vivid_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights in Hugging Face's names and layout, under which both soft caps bite.

    The first head's scores go far beyond their cap, the others' do not: if all did, rounding would grow from
    layer to layer until no two implementations agreed. The last norm's scales are of both signs: if they were
    not, the tied embedding would make most tokens their own successors. Each weight is a whole number in int8
    times a power of two, so that a byte holds it.
    """
    draw = np.random.default_rng(seed)
    weights = {}
    for name, entry in expand(HUGGINGFACE, weight_specs(config)).items():
        if name == "model.norm.weight":
            values = draw.normal(-1.0, 9.0, entry.shape)
        elif "norm" in name:
            values = draw.normal(-0.4 if ".post_" in name else 0.0, 0.3, entry.shape)
        else:
            values = draw.normal(0.0, entry.shape[-1] ** -0.5, entry.shape)
        if "q_proj" in name:
            values *= 1.5
            values[: config.head_dim] *= 14 / 1.5
        unit = 2.0 ** np.ceil(np.log2(np.abs(values).max() / 127))
        weights[name] = (np.round(values / unit) * unit).astype(np.float32)
    return weights
