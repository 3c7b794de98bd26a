"""Reads and writes our own run folders like other formats: the newest parameters, without the optimizer's state."""

from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import to_dict, to_yaml
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.formats.based import settings_of_run
from gemma2_jax.formats.gguf_tokenizer import read_model
from gemma2_jax.formats.layouts import EMBEDDING, WeightPlace
from gemma2_jax.formats.metadata import Metadata, load_metadata
from gemma2_jax.formats.orbax_arrays import OrbaxArrays
from gemma2_jax.formats.source import TensorInfo, WeightSource, files_below, mismatches, wrong_dtypes
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.qat import rounded
from gemma2_jax.model.weights import Params, specs_by_path, weight_specs


class RunSource(WeightSource):
    """A run's newest checkpoint with intact parameters, which are read one at a time.

    The matrices of a run of adaptation=qat are read as their format rounds them, as they were in training.

    Older versions stored the layers of a stack in one chunk; such a stack is read at once and kept.

    Args:
        averaged: whether to take the average of the parameters over the steps (`training.ema`) instead.

    Attributes:
        tree: name of the parameters' tree in the checkpoint.
        step: step of the checkpoint.
        quantize: the format of adaptation=qat; None for other runs.
        skipped: the defect of each newer checkpoint, one clause each.

    Raises:
        UserError: the folder holds no checkpoint of a run, or no average.
    """

    kind = "run folder"

    def __init__(self, folder: str | Path, averaged: bool = False) -> None:
        self.path = Path(folder)
        self.tree = store.AVERAGED if averaged else store.PARAMS
        self.config = store.load_model_config(self.path)
        tokenizer = self.path / store.TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.exists() else None
        self.metadata = load_metadata(self.path)
        settings = settings_of_run(self.path)
        self.quantize = None if settings is None else settings.quantize
        self._specs = specs_by_path(weight_specs(self.config))
        self._whole: dict[str, np.ndarray] = {}
        found, params = store.describe_params(self.path, self.tree)
        self.step, self.skipped = found.step, found.skipped
        self.tensors = {
            name: TensorInfo(tuple(leaf.shape), str(leaf.dtype), self.path / store.FOLDER / str(found.step))
            for name, leaf in params.items()
        }

    @property
    def files(self) -> list[Path]:
        step = self.path / store.FOLDER / str(store.latest_step(self.path))
        return files_below([step / self.tree])

    def problems(self) -> list[str]:
        shapes = {path: spec.shape for path, spec in self._specs.items()}
        return mismatches(self.path, shapes, self.tensors) + wrong_dtypes(self.tensors)

    def weight(self, place: WeightPlace) -> np.ndarray:
        return self._rounded(place, self._read(place.path, ... if place.pair is None else place.pair))

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        if self.quantize is not None and place.path != EMBEDDING:  # blocks may run along these rows
            return self.weight(place)[rows]
        return self._rounded(
            place, self._read(place.path, rows if place.pair is None else (place.pair, rows))
        )

    def _rounded(self, place: WeightPlace, weight: np.ndarray) -> np.ndarray:
        spec = self._specs[place.path]
        if self.quantize is None or not spec.fan_in:
            return weight
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(_round(weight, spec.dims.removeprefix("P"), self.quantize))

    def _read(self, path: str, part: Any) -> np.ndarray:
        """Reads a part of a stored array alone if its chunks allow that, else the whole array once."""
        name = path.replace("/", ".")
        if name in self._whole:
            found: np.ndarray = self._whole[name][part]
            return found
        if part is not ...:
            stored = self._arrays.open(name)
            if stored.chunk_layout.read_chunk.shape[0] == stored.shape[0]:  # of older versions, or small
                self._whole[name] = self._arrays.read(name)
                return self._read(path, part)
        return self._arrays.read(name, part)

    @cached_property
    def _arrays(self) -> OrbaxArrays:
        return OrbaxArrays(store.find_params(self.path, self.tree).path / self.tree)


_round = jax.jit(rounded, static_argnums=(1, 2))


def write_run(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Path, metadata: Metadata | None = None
) -> None:
    """Writes a run folder with a model but no training state; `load_model` reads it, and training can start from it.

    Args:
        tokenizer: SentencePiece model file, or a GGUF file that holds its tokenizer.
    """
    store.save_params(folder, params, {"model": to_dict(config)})
    write_bytes(folder / store.TOKENIZER_FILE, read_model(tokenizer))
    if metadata is not None:
        metadata.save(folder)
    write_text(folder / store.CONFIG_FILE, "model:\n" + _indented(to_yaml(config)))


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
