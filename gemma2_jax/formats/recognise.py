"""Describes a path that is not a readable checkpoint, and what to do about it.

Files are recognised by their names and first bytes. None of them is loaded, since some of these types may run code.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError
from gemma2_jax.data.shards import MANIFEST
from gemma2_jax.files import in_the_way
from gemma2_jax.formats.json_file import read_object

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SAVE = "save it as safetensors, in transformers with AutoModelForCausalLM.from_pretrained(…).save_pretrained(NEW)"
_PICKLES = (
    "PyTorch pickles, which may run code and cannot be read",
    _SAVE,
)
_KERAS = (
    "Keras weights",
    "export them to transformers (export_to_transformers in keras_hub) and give that folder",
)
_OTHER = "give the checkpoint from which it was made"
# Endings of weight files: what they are, and what to do.
_ENDINGS = {
    ".bin": _PICKLES,
    ".pt": _PICKLES,
    ".pth": _PICKLES,
    ".ckpt": _PICKLES,
    ".h5": _KERAS,
    ".keras": _KERAS,
    ".gguf": ("GGUF", "give that file"),
    ".npz": ("NumPy or MLX arrays", _SAVE),
    ".msgpack": ("Flax weights", _SAVE),
    ".onnx": ("an ONNX model", _OTHER),
    ".tflite": ("a LiteRT model", _OTHER),
    ".task": ("a LiteRT model", _OTHER),
    ".litertlm": ("a LiteRT model", _OTHER),
    ".sbs": ("gemma.cpp weights", _OTHER),
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".zst", ".xz")
_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes of files, independent of their names.
_BEGINNINGS = {
    **{bytes((0x80, protocol)): ".pt" for protocol in range(2, 6)},  # a pickle
    b"\x89HDF\r\n\x1a\n": ".h5",
}
_TOKENIZER_FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
# Files by which a checkpoint's folder is recognised.
_PARTS = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "_sharding",
    "manifest.ocdbt",
}
_ADAPTER_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def describe(path: Path) -> str | None:
    """Returns what is at `path` and what to do, as the rest of a sentence that begins with `path`; None if unknown."""
    if path.is_file():
        return _describe_file(path)
    if not path.is_dir():
        above = in_the_way(path)
        return "does not exist" if above is None else f"does not exist: {above} is not a folder"
    return _describe_folder(path)


def describe_weights(folder: Path) -> str | None:
    """Returns which weights a folder without complete safetensors holds, and what to do; None if it has none."""
    if (folder / ADAPTER_WEIGHTS).exists():
        return f"holds {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}; copy it from the adapter's original folder"
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _ENDINGS and file.name != "training_args.bin":
            what, remedy = _ENDINGS[file.suffix]
            return f"holds {what} ({file.name}); {remedy}"
    return None


def missing_shards(names: Iterable[str]) -> list[str]:
    """Returns the missing files of a numbered series such as `NAME-00001-of-00003.safetensors`."""
    names = set(names)
    found = [match for match in map(_SHARD.fullmatch, sorted(names)) if match]
    whole = {
        f"{match[1]}-{number:0{len(match[2])}}-of-{match[3]}.safetensors"
        for match in found
        for number in range(1, int(match[3]) + 1)
    }
    return sorted(whole - names)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves in place of a file that it has not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _describe_file(path: Path) -> str | None:
    with path.open("rb") as file:
        begin = file.read(64)
    if begin.startswith(_LFS):
        return "is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if path.name in _ADAPTER_FILES:
        return f"is one file of an adapter; give its folder, {path.absolute().parent}"
    if (run := enclosing_run(path)) is not None:
        return f"is inside a run folder; give the run folder, {run}"
    if path.suffix == ".safetensors" or path.name in _PARTS:
        return f"is one file of a checkpoint; give its folder, {path.absolute().parent}"
    if path.name == MANIFEST and (kind := _prepared(path.parent)) is not None:
        return f"is the manifest of {kind}; give the folder of a model"
    ending = next((kind for magic, kind in _BEGINNINGS.items() if begin.startswith(magic)), path.suffix)
    if ending in _ENDINGS and ending != ".gguf":
        what, remedy = _ENDINGS[ending]
        return f"holds {what}; {remedy}"
    if path.suffix in _ARCHIVES:
        return "is an archive; unpack it and give the folder"
    if path.name in _TOKENIZER_FILES:
        return "is a tokenizer; give the folder of a model"
    return None


def _describe_folder(folder: Path) -> str | None:
    if (run := enclosing_run(folder)) is not None:
        return f"is inside a run folder; give the run folder, {run}"
    if (folder / "snapshots").is_dir():
        return _describe_cache(folder)
    weights = describe_weights(folder)
    if weights is not None:
        return weights
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith(".safetensors") for name in names):
        return "holds safetensors without their config.json; copy it from the model's original folder"
    if (kind := _prepared(folder)) is not None:
        return f"holds {kind}; give the folder of a model"
    if names & _TOKENIZER_FILES:
        return "holds a tokenizer and no weights; give the folder of a model"
    return None


def enclosing_run(path: Path) -> Path | None:
    """Returns the run folder whose checkpoints folder is, or contains, `path`; None if there is none."""
    whole = path.absolute()
    for run in whole.parents:
        if whole.is_relative_to(run / store.FOLDER) and (run / store.CONFIG_FILE).exists():
            return run
    return None


def _describe_cache(folder: Path) -> str:
    """Describes a folder of the hub's cache, `models--OWNER--NAME`."""
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        snapshots = [named] if named in snapshots else snapshots
    if not snapshots:
        return "is a folder of the hub's cache without a snapshot; download the model again"
    return f"is a folder of the hub's cache; give the snapshot in it, {snapshots[-1]}"


def _prepared(folder: Path) -> str | None:
    """Returns what a folder with a manifest of ours holds; None if it has no such manifest."""
    try:
        manifest = read_object(folder / MANIFEST)
    except UserError:
        return None
    kinds = {"encoding": "a teacher cache (distill.cache)", "parts": "prepared data (data.folder)"}
    return next((kind for name, kind in kinds.items() if name in manifest), None)
