"""llama.cpp, which is what GGUF files are for, reads ours: the same token ids, logits, and greedy continuations."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma2_jax.data.chat_format import render
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.formats.gguf import write_gguf
from gemma2_jax.formats.gguf_encodings import QUANTISED
from gemma2_jax.formats.layouts import GGUF, WeightPlace, expand
from gemma2_jax.formats.load import load
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from tests.model.models import vivid

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the extra gguf is not installed")

pytestmark = pytest.mark.slow

WINDOW = 16
LENGTH = 104  # tokens of each document that the model has memorised
NEW = 72  # tokens that each prompt is continued by
CONFIG = ModelConfig(
    vocab_size=400,
    num_layers=4,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=384,
    sliding_window=WINDOW,
    query_pre_attn_scalar=64,
)
# What logits may differ by. llama.cpp takes GELU from a table of f16 values, and rounds what enters a product with
# an f16 matrix to f16 too.
TOLERANCE = {"f32": 0.03, "f16": 0.2}

TEXTS = [
    "",
    "a",
    " leading and trailing ",
    "the model learns from the teacher, 42 times in 2024.",
    "two  spaces, three   spaces, and" + " " * 40 + "forty",
    "lines\n\nand\n\n\n\n\n\nmore\r\n\ttabs\n ",
    "accents é, λόγος, 漢字, emoji 😀👍🏽, zero\u200dwidth",
    "<b>tags</b> & a < b, <bos> <eos> <pad> <0x41> [INST]",
    "".join(chr(code) for code in range(1, 128)),
]


@pytest.fixture(scope="module")
def tokenizer_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    train_tokenizer(texts, path, vocab_size=CONFIG.vocab_size)
    return path


@pytest.fixture(scope="module")
def documents(texts: list[str], tokenizer_file: Path) -> jax.Array:
    """Token ids [4, LENGTH]."""
    tokenizer = Tokenizer.load(tokenizer_file)
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    return jnp.array([row[:LENGTH] for row in ids if len(row) >= LENGTH][:4])


@pytest.fixture(scope="module")
def model(documents: jax.Array) -> Gemma2:
    """A model that has memorised the documents, with its matrices rounded to f16.

    Random weights would do for the formats, but their two best tokens are often so close that rounding decides
    between them. One that is sure of every next token makes the greedy choice one of substance.
    """
    params = vivid(CONFIG).params()
    optimizer = optax.adam(2e-3)

    def loss(params: Any) -> jax.Array:
        logits = Gemma2(CONFIG, params)(documents[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, documents[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(120):
        params, state = step(params, state)
    rounded = jax.tree.map_with_path(
        lambda path, leaf: leaf if "norm" in str(path) else leaf.astype(jnp.float16).astype(jnp.float32),
        params,
    )
    return Gemma2(CONFIG, rounded)


def written(model: Gemma2, path: Path, tokenizer_file: Path, encoding: str) -> Path:
    params: Any = model.params()

    def weight(place: WeightPlace) -> np.ndarray:
        leaf = params
        for key in place.path.split("/"):
            leaf = leaf[key]
        return np.asarray(leaf if place.pair is None else leaf[place.pair])

    tensors = (
        (name, entry.join([weight(place) for place in entry.places]))
        for name, entry in expand(GGUF, weight_specs(CONFIG)).items()
    )
    write_gguf(path, CONFIG, tensors, tokenizer_file.read_bytes(), encoding, "toy")
    return path


def loaded(path: Path) -> Any:
    """The file in llama.cpp, with a cache of float32 as ours is; the package's default is f16.

    Weights stay as they are in the file. Where the processor has AMX, llama.cpp would rearrange those of q8_0 and q4_0
    for it, and was seen to crash with them (0.3.36 of the package).
    """
    whole = 0  # GGML_TYPE_F32
    parameters = llama_cpp.llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False
    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", lambda: parameters):
        return llama_cpp.Llama(
            str(path),
            n_ctx=512,
            logits_all=True,
            n_threads=1,
            n_threads_batch=1,
            type_k=whole,
            type_v=whole,
            verbose=False,
        )


@pytest.fixture(scope="module")
def llama(model: Gemma2, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(written(model, tmp_path_factory.mktemp("llama") / "f16.gguf", tokenizer_file, "f16"))


def llama_logits(llama: Any, tokens: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_same_ids(llama: Any, tokenizer_file: Path, text: str):
    tokenizer = Tokenizer.load(tokenizer_file)
    ids = tokenizer.encode(text, bos=True)
    assert llama.tokenize(text.encode(), add_bos=True, special=False) == ids
    assert llama.detokenize(ids[1:]).decode() == text  # the package drops a space behind <bos>


def test_documents_have_the_same_ids(llama: Any, tokenizer_file: Path, texts: list[str]):
    tokenizer = Tokenizer.load(tokenizer_file)
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text, bos=True)


def test_a_chat_has_the_same_ids(llama: Any, tokenizer_file: Path):
    tokenizer = Tokenizer.load(tokenizer_file)
    text = render([{"role": "user", "content": "What  is\n\nattention?"}], generation_prompt=True)
    ids = tokenizer.encode(text, bos=True, control=True)
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
    assert (ids.count(4), ids.count(5)) == (2, 1)
    assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    assert llama_cpp.llama_vocab_eot(vocabulary) == tokenizer.end_of_turn_id
    assert llama_cpp.llama_vocab_is_eog(vocabulary, tokenizer.end_of_turn_id)


def test_prompts_are_continued_alike(llama: Any, model: Gemma2, tokenizer_file: Path, documents: jax.Array):
    tokenizer = Tokenizer.load(tokenizer_file)
    prompts = [row[:length].tolist() for row, length in zip(documents, (3, 10, 20, 30), strict=True)]
    ours = Sampler(model, tokenizer).generate_tokens(
        prompts, SamplingConfig(max_new_tokens=NEW, temperature=0.0, stop_tokens=())
    )
    for prompt, continuation in zip(prompts, ours, strict=True):
        assert len(continuation) == NEW > 4 * WINDOW
        logits = np.asarray(model(jnp.array([prompt + continuation]))[0])
        second, first = np.sort(logits[len(prompt) - 1 : -1])[:, -2:].T
        assert (first - second).min() > 2 * TOLERANCE["f16"]
        theirs = llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True)
        assert [token for _, token in zip(range(NEW), theirs, strict=False)] == continuation


@pytest.mark.parametrize("encoding", ["f32", "f16"])
def test_logits_are_alike(model, tokenizer_file, documents, tmp_path, encoding):
    llama = loaded(written(model, tmp_path / "model.gguf", tokenizer_file, encoding))
    theirs = llama_logits(llama, documents[0].tolist())
    ours = np.asarray(model(documents[:1])[0])
    assert np.abs(theirs - ours).max() < TOLERANCE[encoding]


@pytest.mark.parametrize(("encoding", "share"), [("bf16", 0.98), ("q8_0", 0.98), ("q4_0", 0.9)])
def test_coarser_encodings_predict_alike(model, tokenizer_file, documents, tmp_path, encoding, share):
    """Their logits differ by more than rounding alone: llama.cpp rounds what enters a product as the weights are."""
    llama = loaded(written(model, tmp_path / "model.gguf", tokenizer_file, encoding))
    theirs = llama_logits(llama, documents[0].tolist())
    ours = np.asarray(model(documents[:1])[0])
    assert (theirs.argmax(-1) == ours.argmax(-1)).mean() >= share


@pytest.mark.parametrize("encoding", QUANTISED)
def test_quantised_weights_predict_as_we_dequantise_them(
    model, tokenizer_file, documents, tmp_path, encoding
):
    """The file as a source of ours, against llama.cpp: KL divergence and greedy text."""
    path = written(model, tmp_path / "model.gguf", tokenizer_file, encoding)
    llama, (ours, tokenizer) = loaded(path), load(path)
    tokens = documents[:1]
    theirs = jax.nn.log_softmax(llama_logits(llama, tokens[0].tolist()))
    own = jax.nn.log_softmax(ours(tokens)[0])
    assert kl(own, theirs) < 1e-3
    prompt = tokens[0, :10].tolist()
    (continuation,) = Sampler(ours, tokenizer).generate_tokens(
        [prompt], SamplingConfig(max_new_tokens=NEW, temperature=0.0, stop_tokens=())
    )
    generated = llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True)
    text = llama.detokenize([token for _, token in zip(range(NEW), generated, strict=False)]).decode()
    assert text == tokenizer.decode(continuation)


@pytest.mark.parametrize("encoding", QUANTISED)
def test_quantised_weights_are_as_far_from_the_original(model, tokenizer_file, documents, tmp_path, encoding):
    path = written(model, tmp_path / "model.gguf", tokenizer_file, encoding)
    llama, (ours, _) = loaded(path), load(path)
    tokens = documents[:1]
    theirs = jax.nn.log_softmax(llama_logits(llama, tokens[0].tolist()))
    own, original = (jax.nn.log_softmax(each(tokens)[0]) for each in (ours, model))
    assert kl(original, theirs) == pytest.approx(kl(original, own), abs=1e-3)


def kl(one: jax.Array, other: jax.Array) -> float:
    """The mean KL divergence of log-probabilities [T, V]."""
    return float((jnp.exp(one) * (one - other)).sum(-1).mean())


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": WINDOW - 1},
        {"sliding_window": WINDOW + 1},
        {"attn_logit_softcap": 40.0},
        {"final_logit_softcap": 29.0},
        {"rope_base": 9000.0},
        {"query_pre_attn_scalar": 62.0},
        {"norm_eps": 0.1},
    ],
)
def test_another_model_would_be_noticed(model, documents, change):
    """Each constant matters by more than what `test_logits_are_alike` lets pass."""
    ours = model(documents[:1])[0]
    other = Gemma2(replace(CONFIG, **change), model.params())(documents[:1])[0]
    assert np.abs(ours - other).max() > 2 * TOLERANCE["f32"]
