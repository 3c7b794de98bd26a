"""Generation on a mesh gives the tokens of one device."""

from dataclasses import replace

import jax
import pytest

from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.generation import Plain
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.model.models import vivid

# More rows than the mesh has places, shorter and longer than the window of 8.
PROMPTS = [[2, 40], [2, *range(30, 50)], [2, 9, 11, 13, 17, 19, 23, 29]]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0, stop_tokens=(900, 901))


def on(mesh, model):
    targets = abstract_params(weight_specs(model.config), mesh=mesh)
    placed = jax.tree.map(lambda leaf, array: jax.device_put(array, leaf.sharding), targets, model.params())
    return Gemma2(model.config, placed)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("axes", "drafting", "cache"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), True, None),
        (MeshConfig(data=4, tensor=2), False, "int8"),
        (MeshConfig(data=1, fsdp=8), False, None),
    ],
    ids=str,
)
def test_tokens_are_those_of_one_device(model, tokenizer, axes, drafting, cache):
    draft = vivid(replace(model.config, sliding_window=4)) if drafting else None
    settings = replace(GREEDY, temperature=1.0) if drafting else GREEDY
    expected = Sampler(model, tokenizer, draft=draft, quantize_cache=cache).generate_tokens(PROMPTS, settings)
    mesh = build_mesh(axes)
    with jax.set_mesh(mesh):
        placed = None if draft is None else on(mesh, draft)
        sampler = Sampler(on(mesh, model), tokenizer, draft=placed, quantize_cache=cache)
        shards = {
            leaf.sharding.shard_shape(leaf.shape) != leaf.shape
            for leaf in jax.tree.leaves(sampler._decoder)
            if leaf.ndim > 2 or len(leaf) == model.config.vocab_size  # not the scales of norms
        }
        assert shards == {axes.fsdp * axes.tensor > 1}  # every matrix is split, or none
        assert sampler.generate_tokens(PROMPTS, settings) == expected


@pytest.mark.thorough
@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_batch_is_split_over_the_devices(model, tokenizer, cache):
    """Keys and values, which take most of the memory of a large batch, and their scales: by rows and by heads."""
    mesh = build_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        sampler = Sampler(on(mesh, model), tokenizer, quantize_cache=cache)
        generation = sampler._generation(sampler._batch([[2, 40]] * 8, GREEDY))
        assert isinstance(generation, Plain)
        generation.first()
        keys = generation._progress.cache.global_block.keys
    for part in jax.tree.leaves(keys):
        P, B, K, *rest = part.shape
        assert part.sharding.shard_shape(part.shape) == (P, B // 4, K // 2, *rest)
