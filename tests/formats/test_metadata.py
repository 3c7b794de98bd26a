"""Metadata of a checkpoint: kept in a run folder, used by the sampler, and exported again."""

import json
import shutil
from dataclasses import replace

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.formats.metadata import Metadata, load_metadata
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train
from tests.formats.test_huggingface_config import edit_config

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def read(folder, name):
    return json.loads((folder / name).read_text())


def edit(folder, name, **values):
    path = folder / name
    data = read(folder, name) if path.exists() else {}
    path.write_text(json.dumps({**data, **values}))


def through_a_run(folder, tmp_path):
    convert(folder, tmp_path / "through")
    convert(tmp_path / "through", tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize(
    "eos",
    [[1, 242], *(pytest.param(eos, marks=pytest.mark.thorough) for eos in ([1, 5, 9], 242, 1, [9]))],
    ids=str,
)
def test_the_ends_of_a_text_come_back(hf_folder, tmp_path, eos):
    edit(hf_folder, "generation_config.json", eos_token_id=eos)
    back = through_a_run(hf_folder, tmp_path)
    assert read(back, "generation_config.json") == read(hf_folder, "generation_config.json")
    assert read(back, "config.json") == read(hf_folder, "config.json")
    stops = set(eos) if isinstance(eos, list) else {eos}
    for folder in (hf_folder, tmp_path / "through", back):
        assert load(folder)[1].stop_ids == stops


def test_config_json_is_used_where_generation_config_json_has_no_value(hf_folder, tmp_path):
    edit_config(hf_folder, eos_token_id=1, pad_token_id=None, max_position_embeddings=512)
    edit(
        hf_folder, "generation_config.json", eos_token_id=[1, 9], temperature=0.5, transformers_version="4.42"
    )
    (tmp_path / "a").mkdir()
    back = through_a_run(hf_folder, tmp_path / "a")
    config = read(back, "config.json")
    assert [config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")] == [1, 2, 0]
    assert config["max_position_embeddings"] == 512
    assert read(back, "generation_config.json") == {
        "bos_token_id": 2, "eos_token_id": [1, 9], "pad_token_id": 0, "temperature": 0.5
    }  # fmt: skip
    (hf_folder / "generation_config.json").unlink()
    assert load(hf_folder)[1].stop_ids == {1}
    (tmp_path / "b").mkdir()
    assert read(through_a_run(hf_folder, tmp_path / "b"), "generation_config.json")["eos_token_id"] == 1
    edit_config(hf_folder, eos_token_id=...)
    assert load(hf_folder)[1].stop_ids == {1, 5}


def test_the_sampler_stops_at_the_checkpoints_stop_tokens(hf_folder):
    model, tokenizer = load(hf_folder)
    prompt = [tokenizer.encode("the model learns", bos=True)]
    config = SamplingConfig(max_new_tokens=40, temperature=0.0)
    whole = Sampler(model, tokenizer).generate_tokens(prompt, replace(config, stop_tokens=()))[0]
    stop = whole[5]
    edit(hf_folder, "generation_config.json", eos_token_id=[1, stop])
    written = Sampler(*load(hf_folder)).generate_tokens(prompt, config)[0]
    assert written == whole[: whole.index(stop) + 1]


@pytest.mark.filterwarnings("ignore")
def test_transformers_stops_there_too(hf_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    model, tokenizer = load(hf_folder)
    prompt = tokenizer.encode("the model learns", bos=True)
    config = SamplingConfig(max_new_tokens=40, temperature=0.0)
    stop = Sampler(model, tokenizer).generate_tokens([prompt], config)[0][5]
    edit(hf_folder, "generation_config.json", eos_token_id=[1, stop])
    back = through_a_run(hf_folder, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="float32").eval()
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
    assert Sampler(*load(back)).generate_tokens([prompt], config)[0] == written.tolist()
    assert written.tolist()[-1] == stop


def test_names_of_special_tokens_and_settings(hf_folder, tmp_path):
    kept = {
        "eos_token": "<end_of_turn>", "pad_token": "<eos>", "add_bos_token": False, "padding_side": "right",
        "model_max_length": 77, "additional_special_tokens": ["<end_of_turn>"],
    }  # fmt: skip
    edit(hf_folder, "tokenizer_config.json", **kept, auto_map={"AutoTokenizer": "code.py"})
    eos = {"content": "<end_of_turn>", "lstrip": False, "__type": "AddedToken"}
    edit(hf_folder, "tokenizer_config.json", eos_token=eos)
    found = read(through_a_run(hf_folder, tmp_path), "tokenizer_config.json")
    assert {key: found[key] for key in kept} == kept
    assert "auto_map" not in found


def test_special_tokens_map_json_fills_what_is_not_there(hf_folder, tmp_path):
    config = read(hf_folder, "tokenizer_config.json")
    del config["eos_token"]
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit(hf_folder, "special_tokens_map.json", eos_token="<end_of_turn>", pad_token="<unk>")
    found = read(through_a_run(hf_folder, tmp_path), "tokenizer_config.json")
    assert (found["eos_token"], found["pad_token"]) == ("<end_of_turn>", "<pad>")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_of_its_own(hf_folder, tmp_path, place):
    if place == "tokenizer_config.json":
        edit(hf_folder, place, chat_template=TEMPLATE)
    else:
        (hf_folder / place).write_text(TEMPLATE)  # the file counts more
    back = through_a_run(hf_folder, tmp_path)
    assert read(back, "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert open_source(tmp_path / "through").metadata.chat_template == TEMPLATE


def test_several_chat_templates(hf_folder, tmp_path):
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
    edit(hf_folder, "tokenizer_config.json", chat_template=named)
    back = through_a_run(hf_folder, tmp_path)
    assert read(back, "tokenizer_config.json")["chat_template"] == named
    (hf_folder / "additional_chat_templates").mkdir()
    (hf_folder / "additional_chat_templates" / "rag.jinja").write_text("y")
    (hf_folder / "chat_template.jinja").write_text("z")
    assert open_source(hf_folder).metadata.chat_template == {"default": "z", "rag": "y"}


@pytest.mark.filterwarnings("ignore")
def test_transformers_finds_them(hf_folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    pytest.importorskip("jinja2", reason="chat templates need it")
    edit(hf_folder, "tokenizer_config.json", chat_template=TEMPLATE, eos_token="<end_of_turn>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(through_a_run(hf_folder, tmp_path))
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[Hi]"
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<end_of_turn>", 5, 400)


@pytest.mark.thorough
def test_a_run_takes_its_metadata_from_its_initial_checkpoint(toy_run, hf_folder, tmp_path):
    """And a student from its teacher. Going on with the run, or losing its source, changes nothing."""
    source = tmp_path / "source"
    config = replace(
        toy_run,
        output=str(source),
        mesh=MeshConfig(1, 4, 2),
        training=replace(toy_run.training, steps=3, eval_every=3),
    )
    train(config)
    assert not (source / "metadata.json").exists()
    metadata = Metadata(generation={"eos_token_id": [1, 242]}, chat_template=TEMPLATE)
    metadata.save(source)
    begun = replace(config, output=str(tmp_path / "begun"), initialise=InitConfig(str(source)))
    train(begun)
    student = replace(
        config, output=str(tmp_path / "student"), distill=replace(config.distill, teacher=str(source)),
        objective=replace(config.objective, forward_kl=1.0),
    )  # fmt: skip
    train(student)
    for run in (begun, student):
        assert open_source(run.output).metadata == metadata
    shutil.move(source, tmp_path / "moved")
    convert(begun.output, tmp_path / "exported")
    assert read(tmp_path / "exported", "generation_config.json")["eos_token_id"] == [1, 242]
    assert read(tmp_path / "exported", "tokenizer_config.json")["chat_template"] == TEMPLATE


@pytest.mark.parametrize("eos", ["<eos>", [1, "x"], [True], {"a": 1}, 1.5], ids=str)
def test_ids_that_are_none(hf_folder, run_folder, tmp_path, eos):
    edit(hf_folder, "generation_config.json", eos_token_id=eos)
    with pytest.raises(
        UserError, match=r"generation_config.json has eos_token_id .*; it must be a token id or"
    ):
        open_source(hf_folder)
    edit(tmp_path, "metadata.json", generation={"eos_token_id": eos})
    with pytest.raises(
        UserError, match=r"metadata.json has eos_token_id .*; it must be a token id or a list"
    ):
        load_metadata(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "holds no JSON object"),
        ('{"model": []}', "has model []; it must be an object"),
        ('{"chat_template": [1]}', "has chat_template [1]; it must be a string, or strings by name"),
    ],
)
def test_a_damaged_file_of_a_run(tmp_path, content, sentence):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_metadata(tmp_path)
    assert sentence in str(caught.value)


def test_gguf(hf_folder, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`: pip install -e '.[gguf]'")
    edit_config(hf_folder, max_position_embeddings=512)
    edit(hf_folder, "generation_config.json", eos_token_id=[1, 242])
    edit(hf_folder, "tokenizer_config.json", chat_template=TEMPLATE, add_bos_token=False)
    convert(hf_folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "new.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "new.gguf").fields.items()}
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert [fields[f"tokenizer.ggml.{name}"] for name in names] == [1, 5, 242]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["gemma2.context_length"] == 512
    edit(hf_folder, "generation_config.json", eos_token_id=[1, 5, 7, 8])
    with pytest.raises(UserError, match=r"The stop ids are 1, 5, 7, 8, but GGUF can store only 3"):
        convert(hf_folder, tmp_path / "more.gguf")


def test_the_published_template_where_there_is_none(hf_folder, tmp_path):
    """A model that is tuned to chats here has none at its origin."""
    config = read(hf_folder, "tokenizer_config.json")
    del config["chat_template"]
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = read(through_a_run(hf_folder, tmp_path), "tokenizer_config.json")
    assert found["chat_template"] == chat_template()
