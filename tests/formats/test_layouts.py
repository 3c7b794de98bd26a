"""The tables of foreign layouts: shapes as published, every weight once, and there and back."""

import math

import numpy as np
import pytest

from gemma2_jax.formats.layouts import GGUF, HUGGINGFACE, deepmind, expand
from gemma2_jax.formats.source import all_places
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.model.weights import weight_specs
from tests.model.models import released

LAYOUTS = {
    "huggingface": HUGGINGFACE,
    "deepmind": deepmind(False),
    "deepmind transposed": deepmind(True),
    "gguf": GGUF,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_weight_has_one_place(toy_config, layout):
    entries = expand(layout, weight_specs(toy_config))
    places = [place for entry in entries.values() for place in entry.places]
    assert sorted(map(str, places)) == sorted(map(str, all_places(weight_specs(toy_config))))
    assert sum(math.prod(entry.shape) for entry in entries.values()) == count_parameters(toy_config).total


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_joined_and_split_is_the_same(toy_config, layout):
    draw = np.random.default_rng(0)
    for entry in expand(layout, weight_specs(toy_config)).values():
        theirs = draw.standard_normal(entry.shape).astype(np.float32)
        parts = entry.split(theirs)
        np.testing.assert_allclose(entry.join(parts), theirs, atol=1e-6 if entry.tensor.offset else 0)


@pytest.mark.parametrize(
    ("name", "transposed", "leaves", "shapes"),
    [
        ("2b", False, 236, {"q_einsum": (8, 2304, 256), "kv_einsum": (2, 4, 2304, 256)}),
        ("9b", True, 380, {"q_einsum": (16, 3584, 256), "kv_einsum": (2, 8, 3584, 256)}),
        ("27b", True, 416, {"q_einsum": (32, 4608, 128), "kv_einsum": (2, 16, 4608, 128)}),
    ],
)
def test_deepminds_shapes(name, transposed, leaves, shapes):
    config = released(name)
    entries = expand(deepmind(transposed), weight_specs(config))
    assert len(entries) == 2 + 9 * config.num_layers == leaves
    assert entries["embedder/input_embedding"].shape == (256128, config.d_model)
    for tensor, shape in shapes.items():
        assert entries[f"layer_0/attn/{tensor}"].shape == shape
    gating = (2, config.d_ff, config.d_model) if transposed else (2, config.d_model, config.d_ff)
    assert entries["layer_3/mlp/gating_einsum"].shape == gating
    assert entries["layer_3/attn/attn_vec_einsum"].shape == (
        config.num_heads,
        config.head_dim,
        config.d_model,
    )


def test_hugging_faces_shapes():
    entries = expand(HUGGINGFACE, weight_specs(released("2b")))
    assert len(entries) == 2 + 11 * 26
    assert entries["model.layers.25.self_attn.q_proj.weight"].shape == (2048, 2304)
    assert entries["model.layers.25.self_attn.k_proj.weight"].shape == (1024, 2304)
    assert entries["model.layers.25.self_attn.o_proj.weight"].shape == (2304, 2048)
    assert entries["model.layers.25.mlp.down_proj.weight"].shape == (2304, 9216)


def test_single_numbers_map_to_the_right_places(toy_config):
    """Single numbers, followed by hand from our layout to theirs."""
    N, D, H, F = toy_config.num_heads, toy_config.d_model, toy_config.head_dim, toy_config.d_ff
    query = np.arange(D * N * H).reshape(D, N, H)
    gate, up = np.arange(D * F).reshape(D, F), -np.arange(D * F).reshape(D, F)
    hf = expand(HUGGINGFACE, weight_specs(toy_config))
    assert hf["model.layers.1.self_attn.q_proj.weight"].join([query])[2 * H + 3, 5] == query[5, 2, 3]
    assert hf["model.layers.3.mlp.gate_proj.weight"].places[0].path == "pairs/global_block/mlp/gate"
    assert hf["model.layers.3.mlp.gate_proj.weight"].places[0].pair == 1
    plain = expand(deepmind(False), weight_specs(toy_config))["layer_0/mlp/gating_einsum"].join([gate, up])
    turned = expand(deepmind(True), weight_specs(toy_config))["layer_0/mlp/gating_einsum"].join([gate, up])
    assert plain[1, 3, 4] == turned[1, 4, 3] == up[3, 4] != gate[3, 4]
