"""DeepMind's form of Gemma 2: an Orbax checkpoint with one array per weight and no configuration."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma2_jax.config import UserError
from gemma2_jax.formats.layouts import deepmind
from gemma2_jax.formats.source import TOKENIZER_FILE, ForeignSource, TensorInfo
from gemma2_jax.messages import one_line
from gemma2_jax.model.config import ModelConfig

_ARRAYS = {
    "/.zarray": "zarr",
    "/zarr.json": "zarr3",
}  # the metadata file of each array, and TensorStore's driver
_METADATA = "_METADATA"
_EMBEDDING = "embedder/input_embedding"
_ROWS, _PADDING = 256_128, 128  # rows of the released embeddings, and the number of them that are padding


class DeepMindSource(ForeignSource):
    """An Orbax checkpoint in DeepMind's layout, nested or in the flat form of the released files.

    The tree may be a branch of another one, such as `params` in a training state; the other branches are ignored.

    Settings that do not follow from the shapes are those of the released models: window 4096, soft caps 50 and 30, and
    queries scaled by head_dim^-1/2, or by (d_model / heads)^-1/2 for the 27B.

    Raises:
        UserError: the folder holds no such checkpoint.
    """

    kind = "DeepMind Orbax"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._store = _key_value_store(_arrays_folder(self.path))
        self.tensors, self._stored_names = self._list()
        self.config, transposed = _read_config(self.path, self.tensors, self._expected())
        # In the released archives the tokenizer is beside the checkpoint's folder.
        beside = [self.path / TOKENIZER_FILE, self.path.parent / TOKENIZER_FILE]
        self.tokenizer = next((path for path in beside if path.exists()), None)
        super().__init__(deepmind(transposed))

    def read(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self._open(*self._stored_names[name]).read().result())
        except ValueError as error:
            raise UserError(f"{self.path}: {name} cannot be read: {one_line(error)}.") from None

    def _list(self) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, str]]]:
        """Returns the tensors by the layout's names, and for each the stored name and TensorStore's driver."""
        found = {}
        try:
            keys = [key.decode() for key in ts.KvStore.open(self._store).result().list().result()]
            for key in keys:
                for ending, driver in _ARRAYS.items():
                    if key.endswith(ending):
                        stored = key.removesuffix(ending)
                        found[_path(stored.replace(".", "/"))] = stored, driver
            branch = _branch(self.path, list(found))
            tensors, stored_names = {}, {}
            for path, (stored, driver) in found.items():
                if path.startswith(branch):
                    array = self._open(stored, driver)
                    name = _name(path, branch)
                    tensors[name] = TensorInfo(tuple(array.shape), array.dtype.name, self.path)
                    stored_names[name] = stored, driver
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path} is not a complete Orbax checkpoint: {one_line(error)}.") from None
        self._branch = branch
        return tensors, stored_names

    def _expected(self) -> list[str]:
        """Returns the arrays that the checkpoint's metadata lists; none if it has no metadata, like the oldest ones."""
        path = _arrays_folder(self.path) / _METADATA
        if not path.exists():
            return []
        try:
            leaves = json.loads(path.read_bytes())["tree_metadata"].values()
            paths = [_path("/".join(str(key["key"]) for key in leaf["key_metadata"])) for leaf in leaves]
            return [_name(path, self._branch) for path in paths if path.startswith(self._branch)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{path} is truncated or does not list the arrays of an Orbax checkpoint."
            ) from None

    def _open(self, stored: str, driver: str) -> Any:
        return ts.open(
            {
                "driver": driver,
                "kvstore": {**self._store, "path": f"{self._store.get('path', '')}{stored}/"},
                "fill_missing_data_reads": False,  # a lost file would be read as zeros
            }
        ).result()


def is_orbax(folder: Path) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return any((_arrays_folder(folder) / name).exists() for name in (_METADATA, "manifest.ocdbt"))


def _arrays_folder(folder: Path) -> Path:
    """Returns the folder of the arrays; newer versions of Orbax put them into a subfolder."""
    inner = folder / "default"
    return inner if inner.is_dir() else folder


def _key_value_store(folder: Path) -> dict[str, Any]:
    # Not a URL, in which characters such as % and # would have to be escaped.
    files = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "ocdbt", "base": files} if (folder / "manifest.ocdbt").exists() else files


def _path(path: str) -> str:
    """Returns an array's path in the tree, the same for both spellings of the layout."""
    return path.removesuffix("/w")


def _name(path: str, branch: str) -> str:
    """Returns the layout's name of an array."""
    return path.removeprefix(branch).removeprefix("transformer/")


def _branch(folder: Path, paths: Sequence[str]) -> str:
    """Returns the path of the model in the checkpoint's tree: empty, or a prefix such as `params/`.

    Raises:
        UserError: there is no model, or there are several.
    """
    ending = f"transformer/{_EMBEDDING}"
    found = {
        path.removesuffix(ending) if path.endswith(ending) else path.removesuffix(_EMBEDDING)
        for path in paths
        if path == _EMBEDDING or path.endswith(f"/{_EMBEDDING}")
    }
    if not found:
        named = ", ".join(sorted(paths)[:3])
        raise UserError(
            f"{folder} is not a Gemma 2 in DeepMind's layout: it lacks the tensor {_EMBEDDING} and holds "
            f"{named or 'no arrays'}{', …' if len(paths) > 3 else ''}."
        )
    for usual in ("", "params/"):
        if usual in found:
            return usual
    if len(found) > 1:
        raise UserError(
            f"{folder} holds several models, {', '.join(sorted(found))}; accepted: a single one, or one at params/."
        )
    return found.pop()


def _read_config(
    folder: Path, tensors: dict[str, TensorInfo], expected: Iterable[str]
) -> tuple[ModelConfig, bool]:
    """Returns the model config that follows from the shapes, and whether gate and up are transposed.

    Args:
        expected: names of arrays that should exist; without them, a checkpoint that has lost its last layers would be
            read as a smaller model.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            what = _other_gemma(tensors)
            raise UserError(f"{folder} is {what} in DeepMind's layout: it lacks the tensor {name}.")
        if len(tensors[name].shape) != axes:
            raise UserError(
                f"{folder} holds {name} of shape {list(tensors[name].shape)}; it must have {axes} axes."
            )
        return tensors[name].shape

    if any("_query_norm" in name for name in tensors):
        raise UserError(f"{folder} is a Gemma 3 in DeepMind's layout; accepted: Gemma 2.")
    V, D = shape(_EMBEDDING, 2)
    N, _, H = shape("layer_0/attn/q_einsum", 3)
    _, K, _, _ = shape("layer_0/attn/kv_einsum", 4)
    F, _ = shape("layer_0/mlp/linear", 2)
    gating = shape("layer_0/mlp/gating_einsum", 3)
    shape("layer_0/post_attention_norm/scale", 1)  # Gemma 1 lacks it
    if F == D:
        raise UserError(
            f"{folder} has d_ff equal to d_model ({F}), so its shapes do not show whether layer_0/mlp/gating_einsum is "
            "transposed; such a checkpoint cannot be read."
        )
    layers = {int(found[1]) for name in (*tensors, *expected) if (found := re.match(r"layer_(\d+)/", name))}
    num_layers = max(layers) + 1
    try:
        config = ModelConfig(
            vocab_size=V,
            vocab_padding=_PADDING if V == _ROWS else 0,
            num_layers=num_layers,
            d_model=D,
            num_heads=N,
            num_kv_heads=K,
            head_dim=H,
            d_ff=F,
            sliding_window=4096,
            query_pre_attn_scalar=D / N if num_layers == 46 else float(H),
        )
    except UserError as error:
        raise UserError(f"{folder} is not a Gemma 2: {error}") from None
    return config, gating[1:] == (F, D)


def _other_gemma(tensors: dict[str, TensorInfo]) -> str:
    """Describes a checkpoint that lacks a tensor of Gemma 2's first layer."""
    if "layer_0/pre_ffw_norm/scale" in tensors and "layer_0/post_ffw_norm/scale" not in tensors:
        return "a Gemma 1, not a Gemma 2,"
    return "not a Gemma 2"
