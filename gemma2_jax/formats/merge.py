"""Merges several models into one: opens them, checks that they fit, and reads merged weights one at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats.convert import Conversion, Progress, check_arguments, write_checkpoint
from gemma2_jax.formats.layouts import EMBEDDING, WeightPlace
from gemma2_jax.formats.load import load_tokenizer, open_source
from gemma2_jax.formats.merge_adapters import merge_adapters
from gemma2_jax.formats.merge_methods import Linear, MergeMethod, Slerp, TaskArithmetic, Ties, WeightBlock
from gemma2_jax.formats.source import WeightSource, row_blocks
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.vocabulary import without_padding

METHODS = ("linear", "slerp", "task", "ties", "liti")
DENSITY = 0.2  # of the TIES paper

_NEED_BASE = ("task", "ties", "liti")


class MergedSource(WeightSource):
    """The merged model of several checkpoints with the same sizes and tokens, without padding rows.

    Tokenizer and metadata are those of the first model. The embedding, which is also the LM head, is merged in blocks
    of rows; of the other weights, one is in memory at a time for each checkpoint.

    Args:
        method: merges the weights.
        models: checkpoints to merge.
        base: checkpoint that they were tuned from, if the method has one.
    """

    kind = "merged models"

    def __init__(
        self, method: MergeMethod, models: Sequence[WeightSource], base: WeightSource | None
    ) -> None:
        first = models[0]
        self.path, self.config = first.path, without_padding(first.config)
        self.tokenizer, self.metadata = first.tokenizer, first.metadata
        self._method, self._has_base = method, base is not None
        self._sources = [*models, *([] if base is None else [base])]
        # Names are prefixed, since the sources have the same ones.
        self.tensors = {
            f"{number}/{name}": info
            for number, source in enumerate(self._sources)
            for name, info in source.tensors.items()
        }

    @property
    def dtype(self) -> str:
        return common_dtype(self._sources)

    @property
    def note(self) -> str | None:
        return "; ".join(source.note for source in self._sources if source.note is not None) or None

    def problems(self) -> list[str]:
        return [problem for source in self._sources for problem in source.problems()]

    def weight(self, place: WeightPlace) -> np.ndarray:
        if place.path == EMBEDDING:
            return self.rows(place, slice(None))
        arrays = [source.weight(place) for source in self._sources]
        # Numbers are merged in the order in which they lie in memory: formats differ in it, and it makes no difference.
        axes = np.argsort([-stride for stride in arrays[0].strides], kind="stable")
        arrays = [array.transpose(axes) for array in arrays]

        def blocks() -> Iterator[WeightBlock]:
            for rows in row_blocks(arrays[0].shape):
                yield self._block([array[rows] for array in arrays])

        merged = self._combined(blocks(), self._method.measure(blocks))
        return merged.transpose(np.argsort(axes))

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        if place.path != EMBEDDING:
            return self.weight(place)[rows]
        begin, end, _ = rows.indices(self.config.vocab_size)
        return self._combined(self._embedding(begin, end), self._measured_embedding)

    @cached_property
    def _measured_embedding(self) -> Any:
        return self._method.measure(lambda: self._embedding(0, self.config.vocab_size))

    def _embedding(self, begin: int, end: int) -> Iterator[WeightBlock]:
        """Yields the embedding from row `begin` to before row `end`."""
        for part in row_blocks((end - begin, self.config.d_model)):
            rows = slice(begin + part.start, begin + part.stop)
            place = WeightPlace(EMBEDDING, None)
            yield self._block([source.rows(place, rows) for source in self._sources])

    def _block(self, arrays: Sequence[np.ndarray]) -> WeightBlock:
        return WeightBlock(arrays[:-1], arrays[-1]) if self._has_base else WeightBlock(arrays)

    def _combined(self, blocks: Iterator[WeightBlock], measured: Any) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.concatenate([self._method.combine(block, measured) for block in blocks])


def merge(
    models: Sequence[str | Path],
    target_path: str | Path,
    method: str,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    density: float | None = None,
    kind: str | None = None,
    dtype: str | None = None,
    tokenizer_path: str | Path | None = None,
    averaged: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Conversion:
    """Merges models into a new one, tensor by tensor, and verifies the result.

    Args:
        models: checkpoints of any kind that `open_source` accepts.
        target_path: path that must not exist yet; it appears only once everything is written and compared.
        method: `linear`, the weighted mean; `slerp` of two models, or with `base` of their differences from it; `task`,
            base + the weighted sum of the differences; `ties`, which trims the differences and averages those with the
            elected sign; `liti`, from the base (weight 0) towards one model (weight 1).
        weights: one number per model, 1 each by default. Only their ratios matter for linear, slerp and ties.
        base: checkpoint that the models were tuned from, for task, ties, liti, and if wanted slerp.
        density: fraction of the numbers that ties keeps of each difference; `DENSITY` by default.
        kind, dtype: as in `convert`; by default a target that ends in `.gguf` becomes GGUF, another one a Hugging Face
            folder, in the dtype of the models, or float32 if these differ. `peft` merges LoRA adapters of one base,
            with linear or task, into one adapter whose rank is the sum of theirs.
        tokenizer_path: SentencePiece model file to use in place of those of all models.
        averaged: whether to take the average of the weights (`training.ema`) of each of `models`, which must be runs.

    Raises:
        UserError: an argument is invalid (raised before anything is downloaded); the models have different sizes or
            tokenizers; or as `convert`.
    """
    kind = check_arguments(Path(target_path), kind, dtype, tokenizer_path) or "huggingface"
    weights = _checked(models, method, weights, base, density, is_adapter=kind == "peft")

    def open_merged() -> WeightSource:
        sources = [open_source(path, tokenizer_path, averaged=averaged) for path in models]
        sources += [] if base is None else [open_source(base, tokenizer_path)]
        if kind == "peft":
            total = sum(weights) if method == "linear" else 1.0
            return merge_adapters(sources, [weight / total for weight in weights])
        for source in sources[1:]:
            _check_alike(sources[0], source)
        wide = "float32" in (dtype, common_dtype(sources))
        chosen = _method(method, weights, density, "float32" if wide else common_dtype(sources))
        return MergedSource(chosen, sources[: len(models)], None if base is None else sources[-1])

    return write_checkpoint(open_merged, Path(target_path), kind, dtype, progress)


def common_dtype(sources: Sequence[WeightSource]) -> str:
    """Returns the dtype of all sources, or float32 if they differ."""
    dtypes = {source.dtype for source in sources}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _method(name: str, weights: Sequence[float], density: float | None, dtype: str) -> MergeMethod:
    methods: dict[str, Callable[[], MergeMethod]] = {
        "linear": lambda: Linear(weights, dtype),
        "slerp": lambda: Slerp(weights[1] / (weights[0] + weights[1])),
        "task": lambda: TaskArithmetic(weights),
        "liti": lambda: TaskArithmetic(weights),
        "ties": lambda: Ties(weights, DENSITY if density is None else density),
    }
    return methods[name]()


def _checked(
    models: Sequence[str | Path],
    method: str,
    weights: Sequence[float] | None,
    base: str | Path | None,
    density: float | None,
    is_adapter: bool,
) -> Sequence[float]:
    """Returns the weights. Raises UserError if the arguments do not fit each other."""
    count = len(models)
    if method not in METHODS:
        raise UserError(f"--method is {method!r}; accepted: {', '.join(METHODS)}.")
    least, most = {"linear": (2, math.inf), "slerp": (2, 2), "liti": (1, 1)}.get(method, (1, math.inf))
    if not least <= count <= most:
        expected = f"exactly {least}" if least == most else f"at least {least}"
        raise UserError(
            f"--method {method} merges {expected} {'models' if least > 1 else 'model'}, but {count} are given."
        )
    if is_adapter and (method not in ("linear", "task") or base is not None):
        raise UserError(
            "--to peft merges adapters with --method linear or task, and needs no --base, which is that of the "
            "adapters; leave out --to peft to merge complete models."
        )
    if base is None and method in _NEED_BASE and not is_adapter:
        raise UserError(
            f"--method {method} needs --base BASE, the checkpoint that the models were tuned from."
        )
    if base is not None and method == "linear":
        raise UserError("--method linear has no base; leave out --base, or choose task, ties, liti or slerp.")
    if density is not None and method != "ties":
        raise UserError(f"--density is for --method ties, not {method}; leave it out.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density is {density}; it must be above 0 and at most 1.")
    if weights is None and method == "liti":
        raise UserError("--method liti needs --weights W, from 0 (the base) to 1 (the model).")
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} models; give one per model.")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights is {_shown(weights)}; they must be finite numbers.")
    if method in ("slerp", "ties", "liti") and min(weights) < 0:
        raise UserError(f"--weights is {_shown(weights)}; with --method {method} they must be at least 0.")
    if method == "liti" and weights[0] > 1:
        raise UserError(f"--weights is {_shown(weights)}; with --method liti it must be from 0 to 1.")
    if method in ("linear", "slerp", "ties") and sum(weights) == 0:
        raise UserError(f"--weights is {_shown(weights)}; their sum must not be 0 with --method {method}.")
    return weights


def _shown(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


def _check_alike(one: WeightSource, other: WeightSource) -> None:
    """Raises UserError if two checkpoints have different sizes or tokenizers."""
    tokenizer, another = load_tokenizer(one), load_tokenizer(other)
    if tokenizer.fingerprint != another.fingerprint:
        raise UserError(
            f"{one.path} has the tokenizer {tokenizer.fingerprint[:12]} of {tokenizer.vocab_size} tokens, but "
            f"{other.path} has {another.fingerprint[:12]} of {another.vocab_size} tokens, so their weights cannot be "
            "merged; leave one of them out, or, if all their tokens are the same, give one tokenizer.model for both as "
            "--tokenizer FILE."
        )
    configs = without_padding(one.config), without_padding(other.config)
    for field in fields(ModelConfig):
        found, expected = (getattr(config, field.name) for config in configs)
        if found != expected:
            raise UserError(
                f"{one.path} holds a model with {field.name} {found}, but {other.path} has {expected}, so their "
                "weights cannot be merged; leave one of them out."
            )
