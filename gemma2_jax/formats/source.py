"""The common interface of all kinds of checkpoints, which returns our weights one at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats.layouts import Tensor, WeightPlace, expand
from gemma2_jax.formats.metadata import Metadata
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import Specs, specs_by_path, weight_specs

TOKENIZER_FILE = "tokenizer.model"  # other tools' name for a SentencePiece model file
BLOCK = 2**22  # numbers of a weight that are processed at a time
DTYPES = ("float32", "bfloat16", "float16")  # accepted for the weights of a checkpoint


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description in a file, available before the tensor is read.

    Attributes:
        shape: shape in the file.
        dtype: NumPy's name of the dtype, or the file's if NumPy has none.
        file: file that holds the tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


class WeightSource(ABC):
    """A checkpoint that can be read.

    Attributes:
        kind: name of this kind of checkpoint.
        path: folder of the checkpoint, or its only file.
        config: config of its model.
        tokenizer: its SentencePiece model file, or a GGUF file that holds its tokenizer; None if it has none.
        metadata: its metadata for generation and other tools.
        tensors: tensors in its files, by their names there.
    """

    kind: str
    path: Path
    config: ModelConfig
    tokenizer: Path | None
    metadata: Metadata = Metadata()
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> list[Path]:
        """All files that the weights are read from, sorted."""
        return files_below({info.file for info in self.tensors.values()})

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the tensors, in alphabetical order."""
        return tuple(sorted({info.dtype for info in self.tensors.values()}))

    @property
    def dtype(self) -> str:
        """A dtype that holds every weight exactly: the tensors' dtype, or float32 if they have several."""
        return self.dtypes[0] if len(self.dtypes) == 1 else "float32"

    @property
    def note(self) -> str | None:
        """What reading the weights changes, one clause; None if nothing."""
        return None

    @abstractmethod
    def problems(self) -> list[str]:
        """Returns what is wrong with the tensors, one sentence each, without reading the weights."""

    @abstractmethod
    def weight(self, place: WeightPlace) -> np.ndarray:
        """Returns one weight, of a layer or of the whole model, in our layout and the checkpoint's dtype.

        Raises:
            UserError: the weight cannot be read from its file.
        """

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        """Returns some rows of a weight; kinds of checkpoints that can read them alone do so for the embedding."""
        return self.weight(place)[rows]

    def added_tokens(self, first: int) -> dict[int, str]:
        """Returns the tokens with id >= `first` that have an embedding row and a name outside tokenizer.model."""
        return {}

    def check(self) -> None:
        """Raises UserError with the first of `problems()` and the number of others, if there are any."""
        problems = self.problems()
        if problems:
            more = f" ({len(problems) - 1} more: see `gemma2 inspect {self.path}`)" if problems[1:] else ""
            raise UserError(f"{problems[0].removesuffix('.')}{more}.")


class ForeignSource(WeightSource):
    """A checkpoint whose tensors are described by a table in `layouts.py`.

    Args:
        layout: names and axes of its tensors.
    """

    def __init__(self, layout: Sequence[Tensor]) -> None:
        self.entries = expand(layout, weight_specs(self.config))
        self._entry_of: dict[WeightPlace, tuple[str, int]] = {
            place: (name, position)
            for name, entry in self.entries.items()
            for position, place in enumerate(entry.places)
        }

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Returns a tensor of the checkpoint in the checkpoint's own layout."""

    def weight(self, place: WeightPlace) -> np.ndarray:
        name, position = self._entry_of[place]
        return self.entries[name].split(self.read(name))[position]

    def problems(self) -> list[str]:
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        return mismatches(self.path, shapes, self.tensors) + wrong_dtypes(self.tensors)


def files_below(paths: Iterable[Path]) -> list[Path]:
    """Returns the files among `paths` and all files below its folders, sorted."""
    inside = (path.rglob("*") if path.is_dir() else [path] for path in paths)
    return sorted(path for found in inside for path in found if path.is_file())


def mismatches(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Compares the tensors at `path` with the expected shapes.

    Returns:
        One sentence for each tensor that is missing, superfluous or of another shape.
    """
    found = []
    for name, shape in shapes.items():
        if name not in tensors:
            found.append(f"{path} lacks the tensor {name} of shape {list(shape)}.")
        elif tensors[name].shape != shape:
            found.append(
                f"{tensors[name].file} holds {name} of shape {list(tensors[name].shape)}, but the model has "
                f"{list(shape)}."
            )
    for name, info in tensors.items():
        if name not in shapes:
            found.append(f"{info.file} holds the tensor {name}, which this model does not have.")
    return found


def wrong_dtypes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns one sentence for each tensor whose dtype is not accepted."""
    return [
        f"{info.file} holds {name} as {info.dtype}; accepted: {', '.join(DTYPES)}."
        for name, info in tensors.items()
        if info.dtype not in DTYPES
    ]


def row_blocks(shape: Sequence[int]) -> list[slice]:
    """Returns slices of the rows of an array of this shape, of about BLOCK numbers each."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def all_places(specs: Specs) -> Iterator[WeightPlace]:
    """Yields the place of every weight of a model: first those outside the layers, then layer by layer."""
    weights = specs_by_path(specs)
    stacked = [path for path, spec in weights.items() if spec.dims.startswith("P")]
    for path in weights:
        if path not in stacked:
            yield WeightPlace(path, None)
    for pair in range(weights[stacked[0]].sizes["P"]):
        for path in stacked:
            yield WeightPlace(path, pair)
