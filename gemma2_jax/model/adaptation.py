"""How a model's weights are divided into trained and frozen ones."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import jax

from gemma2_jax.config import UserError, refuse, suggest
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import TARGETS, Lora
from gemma2_jax.model.partial import Partial
from gemma2_jax.model.qat import TRAINED_FORMATS, Qat
from gemma2_jax.model.quantised import FORMATS, Format
from gemma2_jax.model.weights import Params, Specs, weight_specs

_ADAPTERS = ("lora", "qlora")
_KINDS_OF = {
    "layers": ("partial", *_ADAPTERS),
    "weights": ("partial",),
    "base": ("qlora",),
    "quantize": ("qat",),
}  # others: of adapters


@dataclass(frozen=True)
class AdaptationConfig:
    """Which weights are trained.

    Attributes:
        kind: `full` trains all weights. `partial` trains some weights of the model in initialise.source and freezes the
            others. `lora` freezes that model and trains two narrow matrices A and B beside each adapted weight (LoRA,
            arXiv 2106.09685). `qlora` is the same with the frozen matrices of the layers in four bits (QLoRA, arXiv
            2305.14314). With these three, checkpoints hold what is trained alone. `qat` trains all weights, the
            matrices as the format `quantize` rounds them (straight-through estimator, arXiv 1308.3432); its run folder
            is read as the rounded model.
        weights: for `partial`, patterns of the trained weights' names, in which `*` stands for any text: `mlp/gate`,
            `attention/*`, `*norm/scale`, `embedder/embedding`.
        layers: numbers of the layers with trained weights, counted from 0; null for all layers. With a list, `partial`
            trains no weight outside of the layers.
        base: for `qlora`, the format of the frozen matrices: `nf4`, double-quantised, or `int4`.
        rank: for `lora` and `qlora`, columns of A and rows of B.
        alpha: numerator of the scale: the weight is W + alpha / rank * A B.
        rslora: whether the scale is alpha / sqrt(rank) instead (arXiv 2312.03732), so that it suits all ranks.
        dropout: fraction of the elements of A's input that are dropped in training, from 0 to below 1.
        targets: adapted weights, among q, k, v, o (attention) and gate, up, down (MLP).
        quantize: for `qat`, the format to train for: `q4_0`, of GGUF, or `int4`, of our own sampler.
    """

    kind: Literal["full", "partial", "lora", "qlora", "qat"] = "full"
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    weights: tuple[str, ...] = ()
    base: Literal["nf4", "int4"] | None = None
    quantize: Literal["q4_0", "int4"] | None = None

    def __post_init__(self) -> None:
        refuse(self._complaints())

    @property
    def is_adapter(self) -> bool:
        """Whether a run trains additional weights beside a frozen base model."""
        return self.kind in _ADAPTERS

    @property
    def format(self) -> Format | None:
        """The format of the frozen matrices; None if they are not quantised."""
        return None if self.base is None else FORMATS[self.base]

    @property
    def has_base(self) -> bool:
        """Whether checkpoints lack the frozen weights, which are those of initialise.source."""
        return self.kind not in ("full", "qat")

    @property
    def scale(self) -> float:
        """s, the factor of A B."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def _complaints(self) -> Iterator[str]:
        for field in fields(self):
            kinds = _KINDS_OF.get(field.name, _ADAPTERS)
            if field.name != "kind" and self.kind not in kinds and getattr(self, field.name) != field.default:
                yield (
                    f"adaptation.{field.name} has no effect if adaptation.kind is {self.kind}; write "
                    f"adaptation={' or adaptation='.join(kinds)}."
                )
        if self.layers is not None and (
            not self.layers or list(self.layers) != sorted({abs(layer) for layer in self.layers})
        ):
            yield (
                f"adaptation.layers is {list(self.layers)}; it must be a list of different layer numbers, counted from "
                "0, in ascending order, or null for all."
            )
        if self.kind == "partial" and not self.weights:
            yield (
                "adaptation.weights is []; it must be a list of patterns of weights' names, as in "
                "adaptation.weights=[attention/*,final_norm/scale]."
            )
        if self.kind == "qlora" and self.base is None:
            yield f"adaptation.base is null with adaptation.kind qlora; it must be {' or '.join(FORMATS)}."
        if self.kind == "qat" and self.quantize is None:
            yield (
                "adaptation.quantize is null with adaptation.kind qat; it must be the format to train for, "
                f"{' or '.join(TRAINED_FORMATS)}."
            )
        if self.is_adapter:
            yield from self._about_adapter()

    def _about_adapter(self) -> Iterator[str]:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is None or not 0 < value < math.inf:
                yield (
                    f"adaptation.{name} is {'null' if value is None else value}; it must be above 0 and finite with "
                    f"adaptation.kind {self.kind}."
                )
        if not 0 <= self.dropout < 1:
            yield f"adaptation.dropout is {self.dropout}; it must be at least 0 and below 1."
        for target in self.targets:
            if target not in TARGETS:
                yield f"adaptation.targets has {target}, which is not a weight, {suggest(target, TARGETS)}."
        if len(set(self.targets)) != len(self.targets) or not self.targets:
            yield (
                f"adaptation.targets is [{', '.join(self.targets)}]; it must be a list of different weights among "
                f"{', '.join(TARGETS)}."
            )


class Adaptation(Protocol):
    """Divides a model's weights into a trained and a frozen part, and joins the two again.

    Every method works with every adaptation. Both parts are nested dicts; either may be empty, and the trained part may
    hold additional weights with specs of their own.
    """

    def specs(self, model: Any) -> tuple[Any, Any]:
        """The specs of the trained and of the frozen part, given those of the whole model (`weight_specs`)."""

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        """The trained and the frozen part of a model that starts from `params`; new weights are drawn with `key`."""

    def join(self, trained: Params, frozen: Params) -> Params:
        """The parameters that `Gemma2` takes. Runs in every step, and gradients flow through it."""


class Full:
    """All weights are trained."""

    def specs(self, model: Any) -> tuple[Any, Any]:
        return model, {}

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return params, {}

    def join(self, trained: Params, frozen: Params) -> Params:
        return trained


FULL = Full()


def build_adaptation(config: AdaptationConfig, model: ModelConfig) -> Adaptation:
    """The adaptation of a configuration, for a model of these sizes.

    Raises:
        UserError: the model has no such layers or weights, its weights are narrower than the rank or cannot be
            quantised, or it would be trained as a whole.
    """
    if config.kind == "full":
        return FULL
    if config.kind == "partial":
        return Partial(model, config.weights, config.layers)
    if config.kind == "qat":
        assert config.quantize is not None
        return Qat(model, config.quantize)
    assert config.rank is not None
    for name in ("d_model", "d_ff") if config.base is not None else ():
        if getattr(model, name) % 2:
            raise UserError(
                f"adaptation.base is {config.base}, which stores two numbers in a byte, so model.{name} must be even; "
                f"it is {getattr(model, name)}. Write adaptation=lora."
            )
    return Lora(model, config.rank, config.scale, config.targets, config.layers)


def divided_specs(config: AdaptationConfig, model: ModelConfig) -> tuple[Specs, Specs]:
    """The specs of the trained and of the frozen part of a model of these sizes."""
    return build_adaptation(config, model).specs(weight_specs(model))
