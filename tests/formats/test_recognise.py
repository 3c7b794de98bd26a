"""What is no checkpoint that is read: named, with what to do, and never loaded."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats.load import open_source


class Trap:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def refusal(path):
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path)).strip()


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside config.json"])
def test_an_adapter_whose_base_is_missing(hf_folder, whole, tmp_path):
    (hf_folder / "model.safetensors").rename(hf_folder / "adapter_model.safetensors")
    base = tmp_path / "base"
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4}
    (hf_folder / "adapter_config.json").write_text(json.dumps(content))
    (hf_folder / "checkpoint-10").mkdir()
    if not whole:
        (hf_folder / "config.json").unlink()
    assert refusal(hf_folder).startswith(f"was trained on the base model {base}: {base} does not exist")
    (hf_folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert refusal(hf_folder) == "/adapter_config.json has peft_type IA3; accepted: LORA."
    (hf_folder / "adapter_config.json").unlink()
    assert refusal(hf_folder).startswith(
        "holds adapter_model.safetensors without adapter_config.json; copy it"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter(tmp_path, name):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path / name) == f"is one file of an adapter; give its folder, {tmp_path}."


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.bin", "a.pth", "a.pt", "a.ckpt"])
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside config.json"])
def test_a_pickle_is_named_and_not_loaded(hf_folder, tmp_path, name, whole):
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if not whole:
        (hf_folder / "config.json").unlink()
    message = refusal(hf_folder)
    assert message.startswith(
        f"holds PyTorch pickles, which may run code and cannot be read ({name}); save it as"
    )
    assert "save_pretrained" in message
    assert refusal(hf_folder / name).startswith("holds PyTorch pickles")
    (hf_folder / name).rename(hf_folder / "weights")
    assert refusal(hf_folder / "weights").startswith("holds PyTorch pickles")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.weights.h5", b"\x89HDF\r\n\x1a\n", "holds Keras weights; export them"),
        ("model.keras", b"PK", "holds Keras weights; export them"),
        ("weights.npz", b"PK", "holds NumPy or MLX arrays; save it"),
        ("flax_model.msgpack", b"x", "holds Flax weights; save it"),
        ("model.onnx", b"x", "holds an ONNX model; give the checkpoint"),
        ("model.litertlm", b"x", "holds a LiteRT model; give the checkpoint"),
        ("2b.sbs", b"x", "holds gemma.cpp weights; give the checkpoint"),
        ("gemma.tar.gz", b"x", "is an archive; unpack it"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1",
            "is a Git LFS pointer; fetch",
        ),
        ("model.safetensors", b"x", "is one file of a checkpoint; give its folder,"),
        ("config.json", b"{}", "is one file of a checkpoint; give its folder,"),
        ("generation_config.json", b"{}", "is one file of a checkpoint; give its folder,"),
        ("model.safetensors.index.json", b"{}", "is one file of a checkpoint; give its folder,"),
        ("_CHECKPOINT_METADATA", b"{}", "is one file of a checkpoint; give its folder,"),
        ("manifest.ocdbt", b"x", "is one file of a checkpoint; give its folder,"),
        (
            "manifest.json",
            b'{"parts": []}',
            "is the manifest of prepared data (data.folder); give the folder",
        ),
        (
            "manifest.json",
            b'{"encoding": {}}',
            "is the manifest of a teacher cache (distill.cache); give",
        ),
        ("tokenizer.model", b"x", "is a tokenizer; give the folder of a model"),
    ],
)
def test_other_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(message)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.weights.h5", "task.json"], "holds Keras weights (model.weights.h5); export them"),
        (
            ["a.gguf", "README.md"],
            "holds GGUF (a.gguf); give that file.",
        ),
        (["model.safetensors"], "holds safetensors without their config.json; copy it"),
        (["tokenizer.model", "README.md"], "holds a tokenizer and no weights; give the folder of a model."),
        (["README.md"], "holds no checkpoint of a known kind; accepted: a run folder"),
        ([], "holds no checkpoint of a known kind; accepted: a run folder"),
    ],
)
def test_other_folders(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize("main", [False, True])
def test_a_folder_of_the_hubs_cache(exported, tmp_path, main):
    cache = tmp_path / "models--google--gemma-2-2b"
    shutil.copytree(exported, cache / "snapshots" / "abc")
    (cache / "snapshots" / "def").mkdir()
    if main:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
    snapshot = cache / "snapshots" / ("abc" if main else "def")
    assert refusal(cache) == f"is a folder of the hub's cache; give the snapshot in it, {snapshot}."
    assert open_source(cache / "snapshots" / "abc").problems() == []


def test_parts_of_a_run(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    for part in ("checkpoints", "checkpoints/0", "checkpoints/0/params"):
        assert refusal(run / part) == f"is inside a run folder; give the run folder, {run}."
    for file in (path for path in (run / "checkpoints").rglob("*") if path.is_file()):
        assert refusal(file) == f"is inside a run folder; give the run folder, {run}."
    for name in ("config.yaml", "metadata.json"):
        (run / name).touch()
        assert refusal(run / name) == f"is one file of a checkpoint; give its folder, {run}."
    (run / "config.yaml").unlink()
    assert "config.yaml" in refusal(run)


def test_a_folder_of_prepared_data(data):
    assert refusal(Path(data.folder)) == "holds prepared data (data.folder); give the folder of a model."


def test_quantised_weights_of_mlx(hf_folder):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    assert refusal(hf_folder).endswith("add adaptation=qlora for training or --quantize int4 for generation.")


def test_arrays_in_a_numpy_file_are_not_loaded(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.array([Trap(tmp_path / "sprung")], object))
    assert refusal(tmp_path).startswith("holds NumPy or MLX arrays (weights.npz); save it")
    assert not (tmp_path / "sprung").exists()
