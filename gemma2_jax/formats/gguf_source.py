"""Reads GGUF files: numbers of 16 and 32 bits exactly, all others dequantised to float32."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats.gguf_header import ARCHITECTURE, header_of, open_reader, package, read_values
from gemma2_jax.formats.gguf_tokenizer import gguf_metadata
from gemma2_jax.formats.layouts import EMBEDDING, GGUF, WeightPlace
from gemma2_jax.formats.source import DTYPES, ForeignSource, mismatches


class GGUFSource(ForeignSource):
    """A GGUF file of a Gemma 2, ours or another tool's. Weights stay on the disk until they are read.

    Raises:
        UserError: the extra `gguf` is missing; or the file is truncated, or its model is not a Gemma 2.
    """

    kind = "GGUF"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = package()
        reader = open_reader(path)
        if reader.endianess == self._gguf.GGUFEndian.BIG:
            raise UserError(f"{path} is a big-endian GGUF file; accepted: little-endian.")
        header = header_of(self.path, reader)
        self.config, self.tensors = header.config, header.tensors
        self.tokenizer = self.path
        self.metadata = gguf_metadata(path, read_values(reader), ARCHITECTURE)
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        super().__init__(GGUF)

    @property
    def quantised(self) -> tuple[str, ...]:
        """The types of tensors that are dequantised when they are read, in alphabetical order."""
        return tuple(kind for kind in self.dtypes if kind not in DTYPES)

    @property
    def dtype(self) -> str:
        return "float32" if self.quantised else super().dtype

    @property
    def note(self) -> str | None:
        if not self.quantised:
            return None
        return f"the weights of {self.path} in {', '.join(self.quantised)} were dequantised"

    def problems(self) -> list[str]:
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        unreadable = [kind for kind in self.quantised if not self._is_readable(kind)]
        return mismatches(self.path, shapes, self.tensors) + [
            f"{self.path} holds {name} as {info.dtype}, which cannot be read."
            for name, info in self.tensors.items()
            if info.dtype in unreadable
        ]

    def read(self, name: str) -> np.ndarray:
        return self._read(name, slice(None))

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        if place.path == EMBEDDING:
            return self._read(GGUF[0].name, rows)
        return super().rows(place, rows)

    def _read(self, name: str, rows: slice) -> np.ndarray:
        """Returns some rows of a tensor."""
        tensor = self._stored[name]
        data = tensor.data[rows]
        kinds = self._gguf.GGMLQuantizationType
        if tensor.tensor_type in (kinds.F32, kinds.F16):
            return np.array(data)
        if tensor.tensor_type == kinds.BF16:
            return np.array(data).view(ml_dtypes.bfloat16)
        dequantised: np.ndarray = self._gguf.quants.dequantize(data, tensor.tensor_type)
        return dequantised

    def _is_readable(self, kind: str) -> bool:
        """Whether the package can dequantise a type."""
        found: Any = self._gguf.GGMLQuantizationType[kind.upper()]
        _, size = self._gguf.GGML_QUANT_SIZES[found]
        try:
            self._gguf.quants.dequantize(np.zeros((1, size), np.uint8), found)
        except NotImplementedError:
            return False
        return True
