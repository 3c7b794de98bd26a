"""Reads and writes our own run folders like other formats: the newest parameters, without the optimizer's state."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import to_dict, to_yaml
from gemma2_jax.files import write_text
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.metadata import Metadata, load_metadata
from gemma2_jax.formats.source import TensorInfo, WeightSource, files_below, mismatches, wrong_dtypes
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import Params, abstract_params, specs_by_path, value_at, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


class RunSource(WeightSource):
    """A run's newest checkpoint with intact parameters; reading the first weight reads all of them.

    Attributes:
        step: step of the checkpoint.
        skipped: the defect of each newer checkpoint, one clause each.

    Raises:
        UserError: the folder holds no checkpoint of a run.
    """

    kind = "run folder"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = store.load_model_config(self.path)
        tokenizer = self.path / store.TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.exists() else None
        self.metadata = load_metadata(self.path)
        found, params = store.describe_params(self.path)
        self.step, self.skipped = found.step, found.skipped
        self.tensors = {
            name: TensorInfo(tuple(leaf.shape), str(leaf.dtype), self.path / store.FOLDER / str(found.step))
            for name, leaf in params.items()
        }

    @property
    def files(self) -> list[Path]:
        step = self.path / store.FOLDER / str(store.latest_step(self.path))
        return files_below([step / "params"])

    def problems(self) -> list[str]:
        shapes = {path: spec.shape for path, spec in specs_by_path(weight_specs(self.config)).items()}
        return mismatches(self.path, shapes, self.tensors) + wrong_dtypes(self.tensors)

    def weight(self, place: WeightPlace) -> np.ndarray:
        leaf = value_at(self._params, place.path)
        return np.asarray(leaf if place.pair is None else leaf[place.pair])

    @cached_property
    def _params(self) -> Any:
        mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
        target = abstract_params(weight_specs(self.config), self.dtype, mesh)
        return jax.tree.map(np.asarray, store.restore_params(self.path, target))


def write_run(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Path, metadata: Metadata | None = None
) -> None:
    """Writes a run folder with a model but no training state; `load_model` reads it, and training can start from it."""
    store.save_params(folder, params, {"model": to_dict(config)})
    shutil.copyfile(tokenizer, folder / store.TOKENIZER_FILE)
    if metadata is not None:
        metadata.save(folder)
    write_text(folder / store.CONFIG_FILE, "model:\n" + _indented(to_yaml(config)))


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
