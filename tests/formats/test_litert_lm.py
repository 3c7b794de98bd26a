"""LiteRT-LM, which is what our files are for, runs them: the same token ids, chats, greedy text, and divergences.

    pip install -e '.[litert]' litert-lm ai-edge-litert
    pytest -m thorough tests/formats/test_litert_lm.py tests/formats/test_litert_private.py -s

`ai-edge-litert`, the engine's interpreter alone, gives the logits, which the engine does not. With -s, the tests print
divergences, and the peak of memory of the 2B's conversion.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import render
from gemma2_jax.data.tokenizer import END_OF_TURN, Tokenizer, train_tokenizer
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.litert import LiteRTFile, LiteRTSettings, model_offset
from gemma2_jax.formats.litert_graph import Graph
from gemma2_jax.formats.litert_quantise import FORMATS
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.quantised import WEIGHT_FORMATS, dequantise, quantise
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import map_specs, weight_specs
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from tests.model.models import vivid

litert_lm = pytest.importorskip("litert_lm", reason="litert-lm is not installed")
pytest.importorskip("litert_converter", reason="the extra litert is not installed")
interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
WINDOW = 16
LENGTH = 104  # tokens of each document that the model has learnt
NEW = 60  # tokens that each prompt is continued by
PIECE = 32  # of a prompt; shorter than the longest one
CONTEXT = 128
CONFIG = ModelConfig(
    vocab_size=400,
    num_layers=4,
    d_model=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    d_ff=256,
    sliding_window=WINDOW,
    query_pre_attn_scalar=32,
)
CHATS = [
    ("What is attention?", "a token reads the tokens before it"),
    ("And the window?", "the last few of them"),
    ("Why a soft cap?", "so that no score grows without bound"),
]


@pytest.fixture(scope="module")
def tokenizer_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("litert") / "tokenizer.model"
    train_tokenizer([*texts, *(" ".join(chat) for chat in CHATS)], path, vocab_size=CONFIG.vocab_size)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def documents(texts: list[str], tokenizer: Tokenizer) -> jax.Array:
    """Token ids [16, LENGTH]."""
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    return jnp.array([row[:LENGTH] for row in ids if len(row) >= LENGTH][:16])


@pytest.fixture(scope="module")
def model(documents: jax.Array, tokenizer: Tokenizer) -> Gemma2:
    """A model that has learnt the documents and the chats, so that it is sure of most next tokens."""
    chats = []
    for user, reply in CHATS:
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        ids = tokenizer.encode(render(turns), bos=True, control=True)
        chats.append(ids + [tokenizer.pad_id] * (LENGTH - len(ids)))
    rows = jnp.concatenate([documents, jnp.array(chats)])
    optimizer = optax.adam(2e-3)

    def loss(params: Any) -> jax.Array:
        logits = Gemma2(CONFIG, params)(rows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.mean(losses, where=rows[:, 1:] != tokenizer.pad_id)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = vivid(CONFIG).params()
    state = optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    return Gemma2(CONFIG, params)


@pytest.fixture(scope="module")
def run(model: Gemma2, tokenizer_file: Path) -> Path:
    folder = tokenizer_file.parent / "run"
    write_run(folder, CONFIG, model.params(), tokenizer_file)
    return folder


@pytest.fixture(scope="module")
def files(run: Path) -> dict[str | None, Path]:
    """The model in each format."""
    found = {format_: run.parent / f"{format_}.litertlm" for format_ in (None, *FORMATS)}
    for format_, path in found.items():
        done = convert(run, path, litert=LiteRTSettings(format_, (8, PIECE), CONTEXT))
        assert (done.target, done.dtype) == ("litert", format_ or "float32")
    return found


def started(path: Path) -> Any:
    """The file in the engine, on the CPU."""
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    return litert_lm.Engine(str(path), backend=litert_lm.Backend.CPU(), cache_dir=":nocache")


@pytest.fixture(scope="module")
def engine(files: dict[str | None, Path]) -> Any:
    return started(files[None])


def greedy() -> Any:
    return litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)


def ours(model: Gemma2, tokenizer: Tokenizer, prompt: list[int], **settings: Any) -> list[int]:
    config = SamplingConfig(max_new_tokens=NEW, temperature=0.0, **settings)
    (found,) = Sampler(model, tokenizer).generate_tokens([prompt], config)
    return list(found)


def test_text_has_the_same_ids(engine: Any, tokenizer: Tokenizer, texts: list[str]):
    for text in [*texts, " leading and trailing ", "two  spaces\n\n\tand é, 漢字, 😀", "<b>tags</b> <bos>"]:
        assert engine.tokenize(text) == tokenizer.encode(text)
    assert engine.bos_token_id == tokenizer.bos_id
    assert engine.eos_token_ids == [[tokenizer.eos_id], [tokenizer.end_of_turn_id]]


def test_prompts_are_continued_alike(engine: Any, model: Gemma2, tokenizer: Tokenizer, documents: jax.Array):
    """Also one that is longer than the window and than the longest piece of a prompt."""
    for row, length in zip(documents, (3, 10, WINDOW + 1, PIECE + 10), strict=False):
        text = tokenizer.decode(row[1:length].tolist())
        prompt = tokenizer.encode(text, bos=True)
        continuation = ours(model, tokenizer, prompt, stop_tokens=())
        logits = np.asarray(model(jnp.array([prompt + continuation]))[0])
        second, first = np.sort(logits[len(prompt) - 1 : -1])[:, -2:].T
        assert (first - second).min() > 1e-3  # else rounding would decide between them
        session = engine.create_session(
            apply_prompt_template=False, sampler_config=greedy(), max_output_tokens=NEW
        )
        session.run_prefill([text])
        assert session.run_decode().texts == [tokenizer.decode(continuation)]


def test_a_chat_is_the_samplers_and_stops_at_the_end_of_a_turn(
    engine: Any, model: Gemma2, tokenizer: Tokenizer
):
    chat = engine.create_conversation(sampler_config=greedy(), max_output_tokens=NEW)
    turns: list[dict[str, str]] = []
    for user, _ in CHATS[:2]:
        turns.append({"role": "user", "content": user})
        prompt = tokenizer.encode(render(turns, generation_prompt=True), bos=True, control=True)
        ids = ours(model, tokenizer, prompt)
        reply = tokenizer.decode(ids).removesuffix(END_OF_TURN)
        assert str(chat.send_message(f" {user} ")) == reply
        if len(turns) == 1:  # the model has learnt chats of one turn
            assert (reply, ids[-1]) == (CHATS[0][1], tokenizer.end_of_turn_id)
            assert chat.token_count == len(prompt) + len(ids)
        turns.append({"role": "assistant", "content": reply})


def runners(path: Path) -> Any:
    """The functions in a file, run by the engine's interpreter."""
    return interpreter.Interpreter(model_content=path.read_bytes()[model_offset(path) :])


def engine_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """The logits [T, V] of a file: a piece of the prompt at once, then single tokens."""
    found = runners(path)
    prefill, decode = (found.get_signature_runner(name) for name in (f"prefill_{PIECE}", "decode"))
    shape = (1, CONFIG.num_kv_heads, CONTEXT, CONFIG.head_dim)
    cache = {name: np.zeros(shape, np.float32) for name in Graph(CONFIG, CONTEXT).caches}
    piece = np.array([tokens[:PIECE]], np.int32)
    cache = prefill(tokens=piece, input_pos=np.arange(PIECE, dtype=np.int32), **cache)
    logits = []
    for position in range(PIECE, len(tokens)):
        token, place = np.array([[tokens[position]]], np.int32), np.array([position], np.int32)
        cache = decode(tokens=token, input_pos=place, **cache)
        logits.append(cache.pop("logits")[0, 0])
    return np.array(logits)


def divergence(logits: Any, other: Any) -> float:
    """The mean KL divergence of logits [T, V] from others."""
    one, two = jax.nn.log_softmax(jnp.asarray(logits)), jax.nn.log_softmax(jnp.asarray(other))
    return float((jnp.exp(one) * (one - two)).sum(-1).mean())


def test_float32_has_our_logits(files, model, documents):
    row = documents[0].tolist()
    assert set(runners(files[None]).get_signature_list()) == {"prefill_8", f"prefill_{PIECE}", "decode"}
    np.testing.assert_allclose(engine_logits(files[None], row), model(documents[:1])[0, PIECE:], atol=1e-3)


@pytest.mark.parametrize(("format_", "factor"), [("int8", 2), ("int4", 1)])
def test_quantised_weights_predict_about_as_ours_do(files, model, documents, format_, factor):
    """The engine also rounds what enters a product to 8 bits. Its int4 keeps the embedding in int8, ours does not."""
    row = documents[0].tolist()
    exact = model(documents[:1])[0, PIECE:]

    def rounded(path: str, spec: Any, leaf: jax.Array) -> jax.Array:
        weight = quantise(leaf, spec.dims, WEIGHT_FORMATS[format_]) if spec.fan_in else None
        return leaf if weight is None else dequantise(weight, jnp.float32)

    own = Gemma2(CONFIG, map_specs(rounded, weight_specs(CONFIG), model.params()))
    found = divergence(exact, engine_logits(files[format_], row))
    limit = divergence(exact, own(documents[:1])[0, PIECE:])
    print(
        f"{format_}: {files[format_].stat().st_size} bytes, KL {found:.2e} in the engine, {limit:.2e} in ours"
    )
    assert 0 < found < factor * limit


def test_one_weight_is_held_at_a_time(tokenizer_file, tmp_path):
    file = LiteRTFile(CONFIG, LiteRTSettings("int8", (8,), 16), tokenizer_file.read_bytes())
    living: list[weakref.ref] = []

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, entry in Graph(CONFIG, 16).weights.items():
            array = np.ones(entry.shape, np.float32)
            assert sum(reference() is not None for reference in living) <= 1  # the consuming loop's
            living.append(weakref.ref(array))
            yield name, array
            del array

    file.write(tmp_path / "model.litertlm", stream())
    assert len(living) == len(Graph(CONFIG, 16).weights)


def test_damage_is_found(tokenizer_file, tmp_path):
    path = tmp_path / "model.litertlm"
    file = LiteRTFile(CONFIG, LiteRTSettings("int4", (8,), 16), tokenizer_file.read_bytes())
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=entry.shape) for name, entry in Graph(CONFIG, 16).weights.items()}
    file.write(path, weights.items())
    file.compare(path, weights.items())
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.litertlm does not hold model.layers.* as it was written"):
        file.compare(path, weights.items())


def test_nothing_is_left_of_a_weight_that_cannot_be_stored(run, model, tokenizer_file, tmp_path):
    params = model.params()
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(jnp.nan)
    write_run(tmp_path / "run", CONFIG, params, tokenizer_file)
    with pytest.raises(UserError, match=r"model.norm.weight holds a number that is not finite"):
        convert(tmp_path / "run", tmp_path / "new.litertlm")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_2b_converts_in_a_fraction_of_its_float32_size(tmp_path):
    """Its weights are 10.5 GB in float32."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    source, target = tmp_path / "2b", tmp_path / "2b.litertlm"
    subprocess.run([sys.executable, "-m", "tests.formats.full_size", source], env=environment, check=True)
    command = [sys.executable, "-m", "gemma2_jax", "convert", source, target, "--quantize", "int8"]
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024
    print(f"{target.stat().st_size / 1e9:.2f} GB, at most {peak / 1e9:.1f} GB of memory")
    assert peak < 3e9
