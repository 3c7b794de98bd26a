import base64
import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.formats.gguf import check_expressible, write_gguf
from gemma2_jax.formats.gguf_encodings import CALIBRATED, ENCODINGS
from gemma2_jax.formats.gguf_header import read_header
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import weight_specs

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


# Rows of D and N * H are whole blocks of 32, those of F are not; ten rows of the embedding are padding.
CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    d_ff=80,
    sliding_window=8,
    query_pre_attn_scalar=24,
    attn_logit_softcap=40.0,
    norm_eps=1e-5,
    vocab_padding=10,
)
NO_PADDING = replace(CONFIG, vocab_size=310, vocab_padding=0)
NAMES = list(expand(GGUF, weight_specs(NO_PADDING)))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["the model learns the text of the books"] * 20, path, vocab_size=310)
    return path.read_bytes()


def arrays(dtype: type = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        name: draw.normal(size=entry.shape).astype(dtype)
        for name, entry in expand(GGUF, weight_specs(NO_PADDING)).items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "model.gguf"


@pytest.fixture
def written(path: Path, model_file: bytes) -> Path:
    write_gguf(path, CONFIG, arrays().items(), model_file, "f16", "toy")
    return path


def contents(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_metadata_is_what_llama_cpp_needs(written: Path, model_file: bytes):
    found = contents(written)
    lists = {key: found.pop(key) for key in list(found) if isinstance(found[key], list)}
    assert found.pop("tokenizer.chat_template") == chat_template()
    assert base64.b64decode(found.pop("gemma2_jax.tokenizer_model")) == model_file
    assert {key: value for key, value in found.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "gemma2",
        "general.type": "model",
        "general.name": "toy",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "gemma2.context_length": 8192,
        "gemma2.embedding_length": 64,
        "gemma2.block_count": 2,
        "gemma2.feed_forward_length": 80,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 24,
        "gemma2.attention.value_length": 24,
        "gemma2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "gemma2.attention.sliding_window": 8,
        "gemma2.attn_logit_softcapping": 40.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert set(lists) == {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
    assert {len(values) for values in lists.values()} == {310}


def test_pieces_have_the_text_the_score_and_the_type_that_llama_cpp_expects(written: Path, model_file: bytes):
    found = contents(written)
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    kinds = gguf.TokenType
    control, unknown, user, byte, normal = (
        kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED, kinds.BYTE, kinds.NORMAL,
    )  # fmt: skip
    assert types[:6] == [control, control, control, unknown, control, control]
    assert tokens[:7] == ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
    assert tokens[10:12] == ["  ", "   "]  # runs of spaces as they stand in a text, not of ▁
    assert set(types[6:25]) == {user}
    assert set(scores[:25]) == {-1000.0}
    assert (tokens[25], types[25], tokens[280], types[280]) == ("<0x00>", byte, "<0xFF>", byte)
    tokenizer = Tokenizer(model_file, "tokenizer")
    assert tokens[281:] == [tokenizer.piece(number) for number in range(281, 310)]
    assert set(types[281:]) == {normal}
    assert scores[281:284] == [0.0, -1.0, -2.0]  # merged in this order


@pytest.mark.parametrize("encoding", [encoding for encoding in ENCODINGS if encoding not in CALIBRATED])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_those_of_the_package_itself(path, model_file, encoding, dtype):
    kinds = gguf.GGMLQuantizationType
    given = arrays(dtype)
    write_gguf(path, CONFIG, given.items(), model_file, encoding, "toy")
    found = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in found] == NAMES
    for tensor in found:
        original = given[tensor.name].astype(np.float32)
        kind = kinds[encoding.upper()]
        if "norm" in tensor.name:
            kind = kinds.F32
        elif "ffn_down" in tensor.name and encoding in ("q8_0", "q4_0"):
            kind = kinds.F16  # rows of 80
        elif tensor.name == "token_embd.weight" and encoding == "q4_0":
            kind = kinds.Q8_0
        assert tensor.tensor_type == kind
        assert tuple(reversed(tensor.shape)) == original.shape
        expected = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
        np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, kind), expected)
        error = np.abs(expected - original).max()
        assert error <= {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_0": 0.4}[kind.name]


def test_long_tensors_are_encoded_in_pieces(path, model_file, monkeypatch):
    monkeypatch.setattr("gemma2_jax.formats.gguf_encodings._ROWS", 7)
    given = arrays()
    write_gguf(path, CONFIG, given.items(), model_file, "q8_0", "toy")
    kind = gguf.GGMLQuantizationType.Q8_0
    embedding = gguf.GGUFReader(path).tensors[0]
    np.testing.assert_array_equal(embedding.data, gguf.quants.quantize(given["token_embd.weight"], kind))


def test_one_tensor_is_held_at_a_time(path, model_file):
    living: list[weakref.ref] = []

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, entry in expand(GGUF, weight_specs(NO_PADDING)).items():
            array = np.ones(entry.shape, np.float32)
            # The consuming loop may still hold the previous array.
            assert sum(reference() is not None for reference in living) <= 1
            living.append(weakref.ref(array))
            yield name, array
            del array

    write_gguf(path, CONFIG, stream(), model_file, "q8_0", "toy")
    assert len(living) == len(NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_pre_attn_scalar": 16.0},
            "query_pre_attn_scalar is 16, .* llama.cpp always uses head_dim, here 24",
        ),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"num_layers": 4, "global_every": 2}, "global_every is 2, .* makes every second layer"),
        ({"num_layers": 514}, "num_layers is 514; llama.cpp loads models of at most 512 layers"),
        ({"vocab_padding": 9}, "The tokenizer has 310 tokens and the model 311"),
    ],
)
def test_a_model_that_cannot_be_expressed_is_refused(path, model_file, change, message):
    with pytest.raises(UserError, match=message):
        write_gguf(path, replace(CONFIG, **change), arrays().items(), model_file, "f16", "toy")
    assert not path.exists()


def test_queries_are_scaled_by_the_rule_of_llama_cpp():
    gemma2_27b = replace(
        CONFIG,
        num_layers=46,
        d_model=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    )
    check_expressible(gemma2_27b)
    with pytest.raises(UserError, match=r"llama.cpp always uses d_model / num_heads, here 144"):
        check_expressible(replace(gemma2_27b, query_pre_attn_scalar=128))
    with pytest.raises(UserError, match=r"llama.cpp always uses head_dim, here 128"):
        check_expressible(replace(gemma2_27b, num_layers=44))


def test_an_unknown_encoding_is_refused(path, model_file):
    with pytest.raises(
        UserError, match="The encoding is 'q4_k'; accepted: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0"
    ):
        write_gguf(path, CONFIG, arrays().items(), model_file, "q4_k", "toy")


@pytest.mark.parametrize("value", [1e5, np.nan])
def test_what_f16_cannot_hold_is_refused(path, model_file, value):
    given = arrays()
    given["blk.1.ffn_up.weight"][3, 5] = value
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight holds .* accepted: f32, bf16"):
        write_gguf(path, CONFIG, given.items(), model_file, "f16", "toy")
    write_gguf(path, CONFIG, given.items(), model_file, "bf16", "toy")


@pytest.mark.parametrize(
    ("encoding", "value", "message"),
    [
        ("bf16", 3.4e38, "has values beyond what bfloat16 can hold; choose float32"),
        ("q8_0", 1e7, "holds a value that is not finite in q8_0; accepted: f32, bf16"),
        ("q4_0", -1e6, "holds a value that is not finite in q4_0; accepted: f32, bf16"),
        ("q8_0", np.nan, "holds a value that is not finite in q8_0; accepted: f32, bf16"),
    ],
)
def test_what_other_encodings_cannot_hold_is_refused(path, model_file, encoding, value, message):
    given = arrays()
    given["blk.1.ffn_up.weight"][3, 5] = value
    with pytest.raises(UserError, match=f"blk.1.ffn_up.weight {message}"):
        write_gguf(path, CONFIG, given.items(), model_file, encoding, "toy")
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram"}, "model_type is BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "text is not normalised"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix is false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is false"),
        ({"byte_fallback": False, "vocab_size": 50}, "byte_fallback is true"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(path, tmp_path, settings, message):
    usual = dict(
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    draw = random.Random(0)
    letters = "abcdefghijklmnop"
    lines = [" ".join("".join(draw.choices(letters, k=6)) for _ in range(9)) for _ in range(200)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "other"), **{**usual, **settings}
    )
    model = (tmp_path / "other.model").read_bytes()
    size = Tokenizer(model, "other").vocab_size
    with pytest.raises(UserError, match=message):
        write_gguf(path, replace(NO_PADDING, vocab_size=size), {}.items(), model, "f16", "toy")


def test_without_the_package_the_message_names_what_to_install(path, model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gemma2_jax\[gguf\]'"):
        write_gguf(path, CONFIG, arrays().items(), model_file, "f16", "toy")
    with pytest.raises(UserError, match=r"pip install 'gemma2_jax\[gguf\]'"):
        read_header(path)


def test_a_write_that_fails_leaves_what_was_there(written: Path, model_file: bytes):
    before = written.read_bytes()

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        yield from list(arrays().items())[:5]
        raise RuntimeError("the disk of the source broke")

    with pytest.raises(RuntimeError, match="the disk of the source broke"):
        write_gguf(written, CONFIG, stream(), model_file, "f32", "toy")
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("wrong", ["order", "too few", "too many", "shape"])
def test_tensors_that_are_not_those_of_the_model_are_no_file(path, model_file, wrong):
    given = list(arrays().items())
    if wrong == "order":
        given[1], given[2] = given[2], given[1]
    elif wrong == "too few":
        given.pop()
    elif wrong == "too many":
        given.append(given[-1])
    else:
        given[0] = (given[0][0], given[0][1].T)
    with pytest.raises(ValueError, match=r"expected tensor|argument"):
        write_gguf(path, CONFIG, given, model_file, "f32", "toy")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_header_describes_what_was_written(path, model_file, encoding):
    write_gguf(path, CONFIG, arrays().items(), model_file, encoding, "toy")
    header = read_header(path)
    assert (header.name, header.encoding, header.num_tokens) == ("toy", encoding, 310)
    assert header.config == NO_PADDING
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: entry.shape for name, entry in expand(GGUF, weight_specs(NO_PADDING)).items()
    }
    short = {"q6_k": "q8_0", "q5_k_m": "q5_1", "q4_k_m": "q5_0"}  # rows of 64
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", **short}.get(encoding, encoding)
    assert header.tensors["blk.0.attn_q.weight"].dtype == dtype
    assert header.tensors["blk.0.attn_norm.weight"].dtype == "float32"
    assert header.tensors["blk.0.attn_norm.weight"].file == path


def minimal(path: Path, architecture: str = "gemma2", embedding: bool = True, **sizes: Any) -> Path:
    """A file with the keys that must be there and an embedding."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    if embedding:
        writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES: dict[str, Any] = dict(
    block_count=2, embedding_length=64, feed_forward_length=128, head_count=4, layer_norm_rms_eps=1e-6
)


def test_where_the_file_is_silent_the_header_has_what_llama_cpp_takes(tmp_path):
    header = read_header(minimal(tmp_path / "model.gguf", **SIZES))
    assert (header.name, header.encoding, header.num_tokens) == ("", "unknown", 0)
    assert header.config == ModelConfig(
        vocab_size=10,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        d_ff=128,
        sliding_window=4096,
        query_pre_attn_scalar=16,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "llama"}, "holds a model with architecture llama; accepted: gemma2"),
        ({"embedding": False}, "lacks the tensor token_embd.weight"),
        ({"block_count": 3}, "num_layers is 3; it must be even"),
        ({"head_count": 0}, "num_heads is 0"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_header(minimal(tmp_path / "model.gguf", **{**SIZES, **change}))


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_missing_is_named(tmp_path, key):
    sizes = {name: value for name, value in SIZES.items() if name != key}
    with pytest.raises(UserError, match=r"model.gguf lacks the key gemma2\.[a-z_.]+\.$"):
        read_header(minimal(tmp_path / "model.gguf", **sizes))


def test_a_truncated_file_is_reported_in_one_sentence(written: Path, tmp_path: Path):
    whole = written.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 50)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut.gguf is not a GGUF file, or is truncated or damaged"):
            read_header(cut)


def test_a_damaged_header_is_never_a_traceback(written: Path, tmp_path: Path):
    whole = bytearray(written.read_bytes())
    damaged = tmp_path / "damaged.gguf"
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        copy = bytearray(whole)
        copy[draw.randrange(1200)] ^= 1 << draw.randrange(8)
        damaged.write_bytes(copy)
        try:
            read_header(damaged)
        except UserError:
            refused += 1
    assert refused > 20  # the rest changed a name or a number into another that is possible


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04" * 100, b"GGUF" + bytes(100)])
def test_a_foreign_file_is_reported_in_one_sentence(tmp_path, content):
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(content)
    with pytest.raises(UserError, match=r"foreign.gguf"):
        read_header(foreign)


def test_a_path_without_a_file_is_reported_in_one_sentence(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_header(path)
