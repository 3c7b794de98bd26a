"""Models that show more than freshly initialised ones."""

import jax

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2


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
