"""Formulas that merge a weight of several models into one, on NumPy arrays.

A large weight is merged in blocks of rows: a method first measures what depends on the whole weight, in passes over its
blocks, and then combines each block. `base`, where a method has one, is the weight of the model that the others were
tuned from.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # registers the dtype bfloat16 with NumPy
import numpy as np

_COLINEAR = 0.9995  # cosine above which two vectors are interpolated linearly
_SHORTEST = 1e-8  # norm of a vector below which it is not normalised


@dataclass(frozen=True)
class WeightBlock:
    """The same rows of a weight of each model.

    Attributes:
        models: arrays of the models to merge.
        base: array of the base; None without a base.
    """

    models: Sequence[np.ndarray]
    base: np.ndarray | None = None

    @property
    def deltas(self) -> list[np.ndarray]:
        """The models minus the base, or the models without a base; float32."""
        models = [model.astype(np.float32) for model in self.models]
        if self.base is None:
            return models
        base = self.base.astype(np.float32)
        return [model - base for model in models]


Blocks = Callable[[], Iterator[WeightBlock]]  # called for each pass over all blocks of a weight


class MergeMethod(ABC):
    """A way to merge."""

    def measure(self, blocks: Blocks) -> Any:
        """Returns what `combine` needs to know of the whole weight."""
        return None

    @abstractmethod
    def combine(self, block: WeightBlock, measured: Any) -> np.ndarray:
        """Returns the merged rows."""


@dataclass(frozen=True)
class Linear(MergeMethod):
    """The weighted mean (model soups, arXiv 2203.05482), bit for bit as mergekit and PyTorch compute it on a CPU.

    Weights, products, sums and the quotient are each rounded to `dtype`. (For five or more models in float32, the order
    of additions in PyTorch depends on the processor, so the last bits may differ.)

    Attributes:
        weights: one number per model; only their ratios matter.
        dtype: dtype of the computation and of the result.
    """

    weights: Sequence[float]
    dtype: str

    def combine(self, block: WeightBlock, measured: Any) -> np.ndarray:
        weights = [self._rounded(np.float32(weight)) for weight in self.weights]
        total = np.zeros(block.models[0].shape, np.float32)
        divisor = np.float32(0)
        for weight, model in zip(weights, block.models, strict=True):
            # The models are rounded too: one may have a wider dtype.
            total += self._rounded(self._rounded(model) * weight)
            divisor += weight
        return (self._rounded(total) / self._rounded(divisor)).astype(self.dtype)

    def _rounded(self, array: Any) -> Any:
        """Returns an array in float32, rounded to `dtype`."""
        return array.astype(self.dtype, copy=False).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Slerp(MergeMethod):
    """Spherical linear interpolation of two vectors, that of mergekit; with a base, of the two differences from it.

    The latter is that of WARP (arXiv 2406.16768, section 3.2). Nearly parallel vectors are interpolated linearly.

    Attributes:
        t: from 0 for the first model to 1 for the second.
    """

    t: float

    def measure(self, blocks: Blocks) -> tuple[float, float]:
        """Returns the coefficients of the two vectors."""
        dots = np.zeros(3)  # of the first vector with itself, of the second, of both
        for block in blocks():
            a, b = (delta.ravel().astype(np.float64) for delta in block.deltas)
            dots += a @ a, b @ b, a @ b
        norms = [norm if norm > _SHORTEST else 1.0 for norm in np.sqrt(dots[:2])]
        cosine = float(dots[2] / norms[0] / norms[1])
        if abs(cosine) > _COLINEAR:
            return 1 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin(angle * (1 - self.t)) / math.sin(angle), math.sin(angle * self.t) / math.sin(angle)

    def combine(self, block: WeightBlock, measured: tuple[float, float]) -> np.ndarray:
        a, b = block.deltas
        return _added(block, np.float32(measured[0]) * a + np.float32(measured[1]) * b)


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """base + the weighted sum of the differences from it (arXiv 2212.04089).

    With one model and a weight from 0 to 1, this is linear interpolation towards the initialisation (LiTI, in WARP,
    arXiv 2406.16768, section 3.3).

    Attributes:
        weights: one number per model.
    """

    weights: Sequence[float]

    def combine(self, block: WeightBlock, measured: Any) -> np.ndarray:
        scaled = (
            np.float32(weight) * delta for weight, delta in zip(self.weights, block.deltas, strict=True)
        )
        return _added(block, sum(scaled, np.zeros((), np.float32)))


@dataclass(frozen=True)
class Ties(MergeMethod):
    """base + the mean of the trimmed differences whose sign is the elected one (TIES, arXiv 2306.01708).

    Each difference keeps its largest numbers; the others become 0. The sign of an element is that of the weighted sum
    of the differences, + if they cancel; the mean, weighted too, is over the models that agree with it.

    Attributes:
        weights: one number per model; only their ratios matter.
        density: fraction of each difference's numbers that are kept, above 0 and at most 1. Numbers as large as the
            smallest kept one are all kept.
    """

    weights: Sequence[float]
    density: float

    def measure(self, blocks: Blocks) -> list[np.float32]:
        """Returns for each model the magnitude below which a difference becomes 0."""
        if self.density >= 1:
            return [np.float32(0)] * len(self.weights)
        return _quantiles(lambda: (block.deltas for block in blocks()), self.density)

    def combine(self, block: WeightBlock, measured: Sequence[np.float32]) -> np.ndarray:
        weights = [np.float32(weight) for weight in self.weights]
        deltas = [
            weight * np.where(np.abs(delta) >= smallest, delta, np.float32(0))
            for weight, delta, smallest in zip(weights, block.deltas, measured, strict=True)
        ]
        positive = sum(deltas[1:], deltas[0]) >= 0
        total, divisor = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
        for weight, delta in zip(weights, deltas, strict=True):
            agrees = np.where(positive, delta > 0, delta < 0)
            total += np.where(agrees, delta, np.float32(0))
            divisor += np.where(agrees, weight, np.float32(0))
        return _added(block, total / np.where(divisor == 0, np.float32(1), divisor))


def _added(block: WeightBlock, delta: np.ndarray) -> np.ndarray:
    return delta if block.base is None else block.base.astype(np.float32) + delta


def _quantiles(passes: Callable[[], Iterator[Sequence[np.ndarray]]], fraction: float) -> list[np.float32]:
    """Returns for each array the smallest of the `fraction` of its numbers with the largest magnitudes.

    Exact, with memory for one block: magnitudes are ordered like their bits, of which a first pass counts the upper
    half, and a second one the lower half of those that share the upper half of the result.

    Args:
        passes: yields the blocks of all arrays, float32; called twice.
    """
    upper: list[np.ndarray] = []
    for arrays in passes():
        upper = upper or [np.zeros(2**16, np.int64) for _ in arrays]
        for counts, array in zip(upper, arrays, strict=True):
            counts += np.bincount(_bits(array) >> 16, minlength=2**16)
    found = [_place(counts, max(1, int(fraction * counts.sum()))) for counts in upper]
    lower = [np.zeros(2**16, np.int64) for _ in found]
    for arrays in passes():
        for (high, _), counts, array in zip(found, lower, arrays, strict=True):
            bits = _bits(array)
            counts += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=2**16)
    return [
        np.uint32(high << 16 | _place(counts, left)[0]).view(np.float32)
        for (high, left), counts in zip(found, lower, strict=True)
    ]


def _bits(array: np.ndarray) -> np.ndarray:
    bits: np.ndarray = np.abs(array).ravel().view(np.uint32)
    return bits


def _place(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Returns the bin that holds the `rank`-th largest item, counted from 1, and its rank within that bin."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, rank))
    return len(counts) - 1 - index, rank - int(above[index - 1] if index else 0)
