"""Our own run folders, read and written like other formats: the newest parameters, not the optimizer's state."""

import shutil
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import to_dict, to_yaml
from gemma2_jax.files import write_text
from gemma2_jax.formats.layouts import Place
from gemma2_jax.formats.source import DTYPES, Source, TensorInfo
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import abstract_params
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


class RunSource(Source):
    """The newest checkpoint of a run; all of its parameters are read into memory with the first weight.

    Raises:
        UserError: the folder holds no checkpoint of ours.
    """

    kind = "run folder"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = store.load_model_config(self.path)
        tokenizer = self.path / store.TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.exists() else None
        file = self.path / store.FOLDER / str(store.latest_step(self.path))
        self.tensors = {
            name: TensorInfo(tuple(leaf.shape), str(leaf.dtype), file)
            for name, leaf in store.describe_params(self.path).items()
        }

    def problems(self) -> list[str]:
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(self.config))[0]
        }
        found = [
            f"{self.path} lacks the weight {name} of shape {list(shape)}."
            for name, shape in wanted.items()
            if name not in self.tensors
        ]
        for name, info in self.tensors.items():
            if name not in wanted:
                found.append(f"{info.file} holds the weight {name}, which this model does not have.")
            elif info.shape != wanted[name]:
                found.append(
                    f"{info.file} holds {name} of shape {list(info.shape)}, where the model has {list(wanted[name])}."
                )
            if info.dtype not in DTYPES:
                found.append(f"{info.file} holds {name} as {info.dtype}; accepted: {', '.join(DTYPES)}.")
        return found

    def weight(self, place: Place) -> np.ndarray:
        leaf: Any = reduce(lambda tree, key: tree[key], place.path.split("/"), self._params)
        return np.asarray(leaf if place.pair is None else leaf[place.pair])

    @cached_property
    def _params(self) -> Any:
        mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
        target = abstract_params(self.config, self.dtype, mesh)
        return jax.tree.map(np.asarray, store.load_params(self.path, target))


def write_run(folder: Path, config: ModelConfig, params: Any, tokenizer: Path) -> None:
    """Write a run folder that holds a model and no training: what `load_model` and a training's start take."""
    store.save_params(folder, params, {"model": to_dict(config)})
    shutil.copyfile(tokenizer, folder / store.TOKENIZER_FILE)
    write_text(folder / store.CONFIG_FILE, "model:\n" + _indented(to_yaml(config)))


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
