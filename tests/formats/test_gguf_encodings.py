"""The type in which each tensor of a GGUF file is stored, and tensors given in blocks of rows."""

import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats.gguf_encodings import (
    CALIBRATED,
    ENCODINGS,
    QUANTISED,
    Storage,
    encode_tensor,
    fallback_note,
    plan_storage,
)
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import weight_specs
from tests.parameters import mostly_thorough

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


def shapes(num_layers: int, d_ff: int = 512) -> dict[str, tuple[int, ...]]:
    config = ModelConfig(
        vocab_size=300,
        num_layers=num_layers,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=d_ff,
        sliding_window=8,
        query_pre_attn_scalar=64,
    )
    return {name: entry.shape for name, entry in expand(GGUF, weight_specs(config)).items()}


@pytest.mark.parametrize(("encoding", "kind"), [("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")])
def test_half_of_the_value_and_down_projections_and_the_embedding_have_more_bits(encoding, kind):
    storage = plan_storage(gguf, shapes(26), encoding)
    finer = {name for name, found in storage.items() if found.type == "q6_k"}
    # The first three of 26 layers (26 // 8), the last four, and every third one in between.
    layers = [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]
    assert finer == {
        "token_embd.weight",
        *(f"blk.{layer}.{part}.weight" for layer in layers for part in ("attn_v", "ffn_down")),
    }
    assert {found.type for name, found in storage.items() if name not in finer} == {"f32", kind}
    assert {name for name, found in storage.items() if found.type == "f32"} == {
        name for name, shape in shapes(26).items() if len(shape) == 1
    }
    assert fallback_note(gguf, storage) is None


def test_all_matrices_of_q6_k_are_alike():
    storage = plan_storage(gguf, shapes(2), "q6_k")
    assert {found.type for found in storage.values()} == {"f32", "q6_k"}


@pytest.mark.parametrize(
    ("encoding", "d_ff", "kind"),
    [
        ("q4_k_m", 416, "q5_0"),
        ("q5_k_m", 416, "q5_1"),
        ("q6_k", 416, "q8_0"),
        ("q4_k_m", 500, "f16"),
        ("q8_0", 500, "f16"),
    ],
)
def test_rows_that_do_not_fit_get_another_type_and_a_note(encoding, d_ff, kind):
    storage = plan_storage(gguf, shapes(4, d_ff), encoding)
    first = storage["blk.0.ffn_down.weight"]
    assert (first.type, first.shape) == (kind, (256, d_ff))
    others = {name: found for name, found in storage.items() if "ffn_down" not in name}
    assert all(found.type == found.usual for found in others.values())
    note = fallback_note(gguf, storage)
    assert note is not None
    assert (
        f"(ffn_down) as {kind}, since rows of {d_ff} are not a multiple of {first.usual}'s blocks of " in note
    )
    assert note.count("\n") == 0


@mostly_thorough("encoding", ["q4_k_m", *(name for name in ENCODINGS if name != "q4_k_m")])
def test_blocks_of_rows_are_the_whole_tensor(encoding):
    kind = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}.get(encoding, encoding)
    values = np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32)
    storage = Storage(values.shape, kind, kind)
    whole = encode_tensor(gguf, "a", values, storage)
    np.testing.assert_array_equal(encode_tensor(gguf, "a", iter((values[:7], values[7:])), storage), whole)
    for wrong in (iter((values[:7],)), iter((values, values[:1])), values[:, :256]):
        with pytest.raises(ValueError, match="expected tensor a"):
            encode_tensor(gguf, "a", wrong, storage)


@mostly_thorough("kind", ["q4_k", "q5_k", "q6_k", "q5_0", "q5_1", "q8_0", "q4_0"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e9])
def test_what_a_type_cannot_hold_is_refused(kind, value):
    values = np.ones((2, 256), np.float32)
    values[1, 77] = value
    with pytest.raises(UserError, match=f"a holds a value that is not finite in {kind}; accepted: f32, bf16"):
        encode_tensor(gguf, "a", values, Storage(values.shape, kind, kind))


def test_the_names_are_those_of_llama_cpp():
    for encoding in QUANTISED:
        assert gguf.LlamaFileType[f"MOSTLY_{encoding.upper()}"].name
    numbers = {encoding: gguf.LlamaFileType[f"MOSTLY_{encoding.upper()}"].value for encoding in CALIBRATED}
    assert numbers == {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
