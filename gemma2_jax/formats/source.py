"""A checkpoint of any kind, as something that gives our weights one at a time."""

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

TOKENIZER_FILE = "tokenizer.model"  # how other tools call a SentencePiece model file
DTYPES = ("float32", "bfloat16", "float16")  # that the weights of a checkpoint may have


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about a tensor before it is read.

    Attributes:
        dtype: its name as numpy has it, or as the file has it if numpy does not know it.
        file: where it lies.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


class WeightSource(ABC):
    """A checkpoint that can be read.

    Attributes:
        kind: what this kind of checkpoint is called.
        path: its folder.
        config: of the model in it.
        tokenizer: its SentencePiece model file, or None if it has none.
        metadata: what it holds beside.
        tensors: what its files hold, by the names used there.
    """

    kind: str
    path: Path
    config: ModelConfig
    tokenizer: Path | None
    metadata: Metadata = Metadata()
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> list[Path]:
        """All that the weights are read from, sorted."""
        return files_below({info.file for info in self.tensors.values()})

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the tensors have, in the order of the alphabet."""
        return tuple(sorted({info.dtype for info in self.tensors.values()}))

    @property
    def dtype(self) -> str:
        """What holds every weight as it is: the tensors' dtype, or float32 if they have several."""
        return self.dtypes[0] if len(self.dtypes) == 1 else "float32"

    @abstractmethod
    def problems(self) -> list[str]:
        """What is wrong with the tensors, a sentence each; found without reading the model's weights."""

    @abstractmethod
    def weight(self, place: WeightPlace) -> np.ndarray:
        """One weight of one layer, or of the whole model, in our layout and the checkpoint's dtype.

        Raises:
            UserError: the file does not give it up.
        """

    def added_tokens(self, first: int) -> dict[int, str]:
        """Tokens from the id `first` on that have a row of the embedding and a name in files beside tokenizer.model."""
        return {}

    def check(self) -> None:
        """Raises UserError with the first of the `problems`, and how many more there are."""
        problems = self.problems()
        if problems:
            more = f" ({len(problems) - 1} more: see `gemma2 inspect {self.path}`)" if problems[1:] else ""
            raise UserError(f"{problems[0].removesuffix('.')}{more}.")


class ForeignSource(WeightSource):
    """A checkpoint whose tensors a table in `layouts.py` describes.

    Args:
        layout: the names and axes of its tensors.
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
        """A tensor of the checkpoint as it is there."""

    def weight(self, place: WeightPlace) -> np.ndarray:
        name, position = self._entry_of[place]
        return self.entries[name].split(self.read(name))[position]

    def problems(self) -> list[str]:
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        return misfits(self.path, shapes, self.tensors) + wrong_dtypes(self.tensors)


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and those in its folders, sorted."""
    inside = (path.rglob("*") if path.is_dir() else [path] for path in paths)
    return sorted(path for found in inside for path in found if path.is_file())


def misfits(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Tensors that are missing, misshaped or superfluous at `path`, where these are expected; a sentence each."""
    found = []
    for name, shape in shapes.items():
        if name not in tensors:
            found.append(f"{path} lacks the tensor {name} of shape {list(shape)}.")
        elif tensors[name].shape != shape:
            found.append(
                f"{tensors[name].file} holds {name} of shape {list(tensors[name].shape)}, where the model has "
                f"{list(shape)}."
            )
    for name, info in tensors.items():
        if name not in shapes:
            found.append(f"{info.file} holds the tensor {name}, which this model does not have.")
    return found


def wrong_dtypes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors whose numbers are of no kind that is read, a sentence each."""
    return [
        f"{info.file} holds {name} as {info.dtype}; accepted: {', '.join(DTYPES)}."
        for name, info in tensors.items()
        if info.dtype not in DTYPES
    ]


def all_places(specs: Specs) -> Iterator[WeightPlace]:
    """Every weight of a model, the embedding first and then layer by layer."""
    weights = specs_by_path(specs)
    stacked = [path for path, spec in weights.items() if spec.dims.startswith("P")]
    for path in weights:
        if path not in stacked:
            yield WeightPlace(path, None)
    for pair in range(weights[stacked[0]].sizes["P"]):
        for path in stacked:
            yield WeightPlace(path, pair)
