"""GGUF files as a source: our own bit for bit, quantised ones dequantised, other tools' with their tokenizer."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.initialise import InitConfig, initial_params
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.gguf_source import GGUFSource
from gemma2_jax.formats.gguf_tokenizer import read_model
from gemma2_jax.formats.load import load, load_tokenizer, open_source
from gemma2_jax.formats.source import all_places
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.parameters import mostly_thorough

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


def rewritten(original: Path, path: Path, change) -> Path:
    """A copy of a GGUF file, as another tool might write it: `change` alters its keys, name to (type, value)."""
    reader = gguf.GGUFReader(original)
    fields = {
        name: (field.types, field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    fields.pop("gemma2_jax.tokenizer_model")
    change(fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture")[1])
    for name, (types, value) in fields.items():
        writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(run_folder, tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    convert(run_folder, path, dtype="bfloat16")
    return path


@mostly_thorough("dtype", ["bfloat16", "float32"])
def test_our_own_files_come_back_bit_for_bit(run_folder, tmp_path, dtype):
    convert(run_folder, tmp_path / "a.gguf", dtype=dtype)
    convert(tmp_path / "a.gguf", tmp_path / "back", dtype=dtype)
    original, back = open_source(run_folder), open_source(tmp_path / "back")
    assert back.config == original.config
    for place in all_places(weight_specs(original.config)):
        np.testing.assert_array_equal(back.weight(place), original.weight(place).astype(dtype))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (
        run_folder / "tokenizer.model"
    ).read_bytes()
    convert(tmp_path / "back", tmp_path / "again" / "a.gguf", dtype=dtype)
    assert (tmp_path / "again" / "a.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_a_file_is_a_checkpoint_like_any_other(file, run_folder, params):
    source = GGUFSource(file)
    assert (source.kind, source.dtypes, source.note) == ("GGUF", ("bfloat16", "float32"), None)
    model, tokenizer = load(file, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.params(), params)
    assert tokenizer.fingerprint == load_tokenizer(open_source(run_folder)).fingerprint
    assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.end_of_turn_id}
    assert source.metadata.chat_template == chat_template()
    assert source.metadata.model == {"max_position_embeddings": 8192}


@mostly_thorough("encoding", ["q4_k_m", "q8_0", "q6_k", "q5_k_m", "q4_0"])
def test_quantised_files_are_dequantised_and_described(run_folder, tmp_path, capsys, encoding):
    convert(run_folder, tmp_path / "a.gguf", dtype=encoding)
    done = convert(tmp_path / "a.gguf", tmp_path / "hf", "huggingface")
    source = GGUFSource(tmp_path / "a.gguf")
    types = ", ".join(source.quantised)
    assert done.notes == (f"the weights of {tmp_path}/a.gguf in {types} were dequantised",)
    assert done.dtype == "float32"
    capsys.readouterr()
    load(tmp_path / "a.gguf")
    assert capsys.readouterr().err == f"gemma2: {done.notes[0]}.\n"
    original, exported = open_source(run_folder), open_source(tmp_path / "hf")
    for place in all_places(weight_specs(source.config)):
        expected, found = original.weight(place).astype(np.float32), exported.weight(place)
        np.testing.assert_array_equal(found, source.weight(place))
        assert np.abs(found - expected).max() <= 0.16 * np.abs(expected).max()


@pytest.mark.thorough
def test_a_run_starts_from_the_dequantised_weights(run_folder, tmp_path, capsys):
    """With a message: the run trains arrays, whatever the file holds."""
    convert(run_folder, tmp_path / "a.gguf", dtype="q8_0")
    expected, tokenizer = load(tmp_path / "a.gguf")
    capsys.readouterr()
    initialise = InitConfig(str(tmp_path / "a.gguf"))
    mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
    found = initial_params(initialise, expected.config, tokenizer, mesh, [])
    assert f"the weights of {tmp_path}/a.gguf in q8_0 were dequantised." in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, found, expected.params())


def test_the_rows_of_the_embedding_are_read_alone(run_folder, tmp_path):
    convert(run_folder, tmp_path / "a.gguf", dtype="q8_0")
    source = open_source(tmp_path / "a.gguf")
    place = next(iter(all_places(weight_specs(source.config))))
    np.testing.assert_array_equal(source.rows(place, slice(3, 9)), source.weight(place)[3:9])


def test_the_tokenizer_of_another_tools_file_is_rebuilt(file, run_folder, texts, tmp_path):
    path = rewritten(file, tmp_path / "other.gguf", lambda fields: None)
    original = Tokenizer.load(run_folder / "tokenizer.model")
    rebuilt = load_tokenizer(open_source(path))
    assert rebuilt.fingerprint != original.fingerprint
    assert [rebuilt.piece(number) for number in range(rebuilt.vocab_size)] == [
        original.piece(number) for number in range(original.vocab_size)
    ]
    ids = (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id, rebuilt.end_of_turn_id)
    assert ids == (original.bos_id, original.eos_id, original.pad_id, original.end_of_turn_id)
    spaces = "two  spaces,\n\n\nlines <start_of_turn> ▁ é 漢字 😀" + " " * 40
    for text in [*texts[:20], spaces]:
        for control in (False, True):
            assert rebuilt.encode(text, control=control) == original.encode(text, control=control)
        assert rebuilt.decode(rebuilt.encode(text)) == text


def without(key):
    return lambda fields: fields.pop(key)


def other_tokenizer(fields):
    fields["tokenizer.ggml.model"] = (fields["tokenizer.ggml.model"][0], "gpt2")


def short_list(fields):
    types, scores = fields["tokenizer.ggml.scores"]
    fields["tokenizer.ggml.scores"] = (types, scores[:-1])


def other_architecture(fields):
    fields["general.architecture"] = ([], "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("gemma2.embedding_length"), r"a.gguf lacks the key gemma2.embedding_length\.$"),
        (without("tokenizer.ggml.tokens"), "a.gguf has no complete list tokenizer.ggml.tokens; give"),
        (without("tokenizer.ggml.token_type"), "no complete list tokenizer.ggml.token_type; give"),
        (short_list, "no complete list tokenizer.ggml.scores; give the model's SentencePiece file as --tok"),
        (other_tokenizer, "a.gguf has the tokenizer gpt2; accepted: llama, which is SentencePiece's"),
        (other_architecture, "a.gguf holds a model with architecture llama; accepted: gemma2"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, tmp_path, change, message):
    path = rewritten(file, tmp_path / "a.gguf", change)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_truncated_file_is_refused(file, tmp_path):
    content = file.read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a.gguf is not a GGUF file, or is truncated or damaged"):
        open_source(tmp_path / "a.gguf")


@mostly_thorough("key", [b"general.architecture", b"tokenizer.chat_template"])
def test_a_text_that_is_not_utf_8_is_damage(file, tmp_path, key):
    content = file.read_bytes()
    place = content.index(key) + len(key) + 4 + 8  # behind the type and the length
    (tmp_path / "a.gguf").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(UserError, match=r"a.gguf is not a GGUF file, or is truncated or damaged"):
        open_source(tmp_path / "a.gguf")


def test_a_damaged_copy_of_the_tokenizer_is_refused(file, tmp_path):
    content = file.read_bytes()
    place = content.index(b"gemma2_jax.tokenizer_model") + 60
    (tmp_path / "a.gguf").write_bytes(content[:place] + b"\0" + content[place + 1 :])
    with pytest.raises(UserError, match=r"a.gguf has a damaged gemma2_jax.tokenizer_model"):
        read_model(tmp_path / "a.gguf")


def test_types_that_cannot_be_dequantised_are_named(file, monkeypatch):
    source = GGUFSource(file)
    name = "blk.0.attn_q.weight"
    tensor = source.tensors[name]
    source.tensors = {**source.tensors, name: type(tensor)(tensor.shape, "q8_k", tensor.file)}
    assert source.problems() == [f"{file} holds {name} as q8_k, which cannot be read."]
