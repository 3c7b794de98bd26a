"""LiteRT-LM files, as far as no foreign package is needed: the functions inside, stored numbers, options, messages."""

import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import render
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.litert import LiteRTSettings, template, template_note
from gemma2_jax.formats.litert_graph import Graph
from gemma2_jax.formats.litert_model import storages
from gemma2_jax.formats.litert_quantise import BLOCK, encode_rows
from gemma2_jax.formats.metadata import Metadata
from gemma2_jax.model.quantised import INT8, dequantise, quantise
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import value_at
from tests.model.models import vivid
from tests.parameters import mostly_thorough


def weights_of(graph: Graph, model: Gemma2) -> dict[str, jax.Array]:
    """The weights by name, as a file stores them."""
    params: Any = model.params()

    def weight(place: WeightPlace) -> np.ndarray:
        leaf = value_at(params, place.path)
        return np.asarray(leaf if place.pair is None else leaf[place.pair])

    return {
        name: jnp.asarray(entry.join([weight(place) for place in entry.places]))
        for name, entry in graph.weights.items()
    }


@mostly_thorough("sizes", [{"num_layers": 2}, {"num_layers": 4, "global_every": 2}])
def test_a_prompt_in_pieces_and_single_tokens_give_the_models_logits(toy_config, sizes):
    """Every layer has its window, and padding behind a prompt leaves no trace, even if it goes beyond the cache."""
    context, piece, prompt = 30, 16, 21
    config = replace(toy_config, sliding_window=5, **sizes)
    model, graph = vivid(config, 3.0), Graph(config, context)
    weights = weights_of(graph, model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, context).astype(np.int32)
    expected = model(jnp.array([tokens]))[0]
    run = jax.jit(graph.run, static_argnames="has_logits")
    cache = {name: jnp.full((1, 2, context, 8), 9.0) for name in graph.caches}
    for start in range(0, prompt, piece):
        given = tokens[start : min(start + piece, prompt)]
        row, positions = np.zeros((1, piece), np.int32), np.zeros(piece, np.int32)
        row[0, : len(given)] = given
        positions[: len(given)] = start + np.arange(len(given))  # 0 behind them, as the engine has it
        cache = run({"tokens": row, "input_pos": positions, **cache}, weights, has_logits=False)
    for position in range(prompt, context):
        row, positions = tokens[position].reshape(1, 1), np.array([position], np.int32)
        cache = run({"tokens": row, "input_pos": positions, **cache}, weights, has_logits=True)
        logits = cache.pop("logits")
        assert logits.shape == (1, 1, config.vocab_size)
        np.testing.assert_allclose(logits[0, 0], expected[position], atol=1e-4)


def test_int8_is_the_packages_own():
    weight = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    weight[2] = 0
    codes, scales = encode_rows(weight, "int8", "w")
    assert (codes.dtype.name, codes.shape) == ("int8", (6, 40))
    assert (scales.dtype.name, scales.shape) == ("float32", (6,))
    own = dequantise(quantise(jnp.asarray(weight), "VD", INT8), jnp.float32)
    np.testing.assert_array_equal(codes * scales[:, None], own)
    assert (scales > 0).all()  # the engine refuses 0


def test_int4_chooses_the_nearest_codes_of_scales_that_the_engine_does_not_round():
    weight = np.random.default_rng(0).normal(size=(6, 4 * BLOCK)).astype(np.float32)
    weight[2], weight[3] = 0, weight[3] * 1e-3
    pairs, scales = encode_rows(weight, "int4", "w")
    assert (pairs.dtype.name, pairs.shape) == ("uint8", (6, 2 * BLOCK))
    assert (scales.dtype.name, scales.shape) == ("float16", (6, 4))
    np.testing.assert_array_equal(scales.astype(np.float32).astype(ml_dtypes.bfloat16), scales)
    assert (scales > 0).all()
    codes = np.stack([pairs << 4, pairs & 0xF0], -1).view(np.int8).reshape(weight.shape) >> 4
    assert (codes.min(), codes.max()) == (-8, 7)
    steps = np.repeat(scales.astype(np.float32), BLOCK, axis=1)
    # Half a step, and the rounding of the scale at the largest codes: 8 steps times 2^-9.
    assert (np.abs(codes * steps - weight) <= steps * (0.5 + 8 * 2**-9 + 1e-6)).all()


@pytest.mark.parametrize(
    ("format_", "value", "sentence"),
    [
        (
            None,
            np.nan,
            "w holds a number that is not finite, with which a model gives no text; check the source.",
        ),
        ("int8", np.inf, "w holds a number that is not finite"),
        ("int4", 1e6, "w has values beyond what the scales of int4 can hold; choose --quantize int8."),
    ],
)
def test_what_cannot_be_stored_is_refused(format_, value, sentence):
    weight = np.ones((2, BLOCK), np.float32)
    weight[1, 3] = value
    with pytest.raises(UserError, match=sentence):
        encode_rows(weight, format_, "w")


def test_matrices_are_quantised_and_norms_are_not(toy_config):
    config = replace(toy_config, head_dim=16)
    found = storages(Graph(config, 16), "int4")
    assert {each.format for name, each in found.items() if "norm" in name} == {None}
    assert found["model.embed_tokens.weight"].format == "int8"
    down = found["model.layers.1.mlp.down_proj.weight"]
    assert (down.shape, down.size, down.scales) == ((32, 64), 32 * 64 // 2, (32, 2))
    with pytest.raises(UserError) as caught:
        storages(Graph(replace(config, d_ff=80), 16), "int4")
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj.weight has rows of 80 numbers, and int4 stores whole blocks of 32; choose "
        "--quantize int8."
    )
    assert storages(Graph(replace(config, d_ff=80), 16), "int8")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantize": "int2"}, "--quantize is int2; accepted: int8, int4."),
        ({"context": 1}, "--context is 1; it must be at least 2: a token and the next one."),
        (
            {"prefill": (32, 5000)},
            "--prefill is 32,5000; accepted: numbers of tokens from 1 to the context (4096), such as --prefill 128.",
        ),
        (
            {"prefill": (0,), "context": 9},
            "--prefill is 0; accepted: numbers of tokens from 1 to the context (9), such ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(UserError) as caught:
        LiteRTSettings(**settings)
    assert str(caught.value).startswith(sentence)


def test_prefill_is_sorted_and_within_the_context():
    assert LiteRTSettings(prefill=(32, 8, 32)).prefill == (8, 32)
    assert [LiteRTSettings(context=n).prefill for n in (4096, 200, 50)] == [(128, 1024), (128,), (50,)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "new.litertlm --prefill 1,b",
            "--prefill is '1,b'; accepted: numbers of tokens with commas between, such as",
        ),
        (
            "new --quantize int8",
            "--quantize, --prefill and --context belong to a LiteRT-LM file, which new is not;",
        ),
        (
            "new --context 9",
            "--quantize, --prefill and --context belong to a LiteRT-LM file, which new is not;",
        ),
        ("new.litertlm --dtype bfloat16", "dtype is 'bfloat16'; accepted for a litert target: float32."),
        ("new.litertlm", "A LiteRT-LM file needs the extra litert: pip install 'gemma2_jax[litert]'."),
    ],
)
def test_options_are_checked_before_the_source(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    monkeypatch.setattr("gemma2_jax.formats.convert.open_source", None)  # may fetch gigabytes
    assert main(["convert", "source", *words.split()]) == 1
    assert capsys.readouterr().err.startswith(f"gemma2: {sentence}")
    assert not list(tmp_path.iterdir())


def test_other_conversions_do_not_import_the_extra(run_folder, tmp_path, monkeypatch):
    for name in ("litert_converter", "litert_lm_builder", "litert_lm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert convert(run_folder, tmp_path / "hf").target == "huggingface"


def test_the_template_gives_gemma_2s_turns():
    jinja2 = pytest.importorskip("jinja2", reason="chat templates need it")
    turns = [
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Why?"},
    ]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    compiled = jinja2.Template(template())
    for messages in (turns, parts):
        assert compiled.render(messages=messages, add_generation_prompt=True) == render(turns, True)
    system = {"role": "system", "content": "Be brief."}
    begun = [{"role": "user", "content": "Be brief.\n\nHello"}, *turns[1:]]
    assert compiled.render(messages=[system, *turns], add_generation_prompt=False) == render(begun)


def test_a_template_of_its_own_is_noted():
    assert template_note(Metadata()) is None
    assert template_note(Metadata(chat_template="{{ x }}")) == (
        "the source's own chat template is not in the file, which has Gemma 2's"
    )
