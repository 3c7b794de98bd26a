"""How a model's weights are divided into trained and frozen ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax

from gemma2_jax.config import UserError, refuse, suggest
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import TARGETS, Lora
from gemma2_jax.model.quantised import FORMATS, Format
from gemma2_jax.model.weights import Params


@dataclass(frozen=True)
class AdaptationConfig:
    """Which weights are trained.

    Attributes:
        kind: `full` trains all weights. `lora` trains two narrow matrices A and B beside each adapted weight of a
            frozen model, that of initialise.source (LoRA, arXiv 2106.09685). Checkpoints then hold A and B alone.
            `qlora` is the same with the frozen matrices of the layers in four bits (QLoRA, arXiv 2305.14314).
        rank: columns of A and rows of B; null with `full`, as are all keys below.
        alpha: numerator of the scale: the weight is W + alpha / rank * A B.
        rslora: whether the scale is alpha / sqrt(rank) instead (arXiv 2312.03732), so that it suits all ranks.
        dropout: fraction of the elements of A's input that are dropped in training, from 0 to below 1.
        targets: adapted weights, among q, k, v, o (attention) and gate, up, down (MLP).
        layers: numbers of the adapted layers, counted from 0; null for all layers.
        base: with `qlora`, the format of the frozen matrices: `nf4`, double-quantised, or `int4`; else null.
    """

    kind: Literal["full", "lora", "qlora"] = "full"
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    base: Literal["nf4", "int4"] | None = None

    def __post_init__(self) -> None:
        refuse(self._complaints())

    @property
    def is_adapter(self) -> bool:
        """Whether a run trains additional weights beside a frozen base model."""
        return self.kind in ("lora", "qlora")

    @property
    def format(self) -> Format | None:
        """The format of the base model's matrices; None if they are not quantised."""
        return None if self.base is None else FORMATS[self.base]

    @property
    def scale(self) -> float:
        """s, the factor of A B."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def _complaints(self) -> Iterator[str]:
        if self.kind == "full":
            for name, unset in (
                ("rank", None),
                ("alpha", None),
                ("rslora", False),
                ("dropout", 0.0),
                ("targets", ()),
                ("layers", None),
                ("base", None),
            ):
                if getattr(self, name) != unset:
                    yield f"adaptation.{name} has no effect if adaptation.kind is full; write adaptation=lora."
            return
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is None or value <= 0:
                yield (
                    f"adaptation.{name} is {'null' if value is None else value}; it must be above 0 with "
                    f"adaptation.kind {self.kind}."
                )
        if self.kind == "lora" and self.base is not None:
            yield (
                f"adaptation.base is {self.base}, which has no effect if adaptation.kind is lora; write "
                "adaptation=qlora."
            )
        if self.kind == "qlora" and self.base is None:
            yield f"adaptation.base is null with adaptation.kind qlora; it must be {' or '.join(FORMATS)}."
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
        if self.layers is not None and (
            not self.layers or list(self.layers) != sorted({abs(layer) for layer in self.layers})
        ):
            yield (
                f"adaptation.layers is {list(self.layers)}; it must be a list of different layer numbers, counted from "
                "0, in ascending order, or null for all."
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
        UserError: the model has no such layers, its weights are narrower than the rank, or they cannot be quantised.
    """
    if config.kind == "full":
        return FULL
    assert config.rank is not None
    for name in ("d_model", "d_ff") if config.base is not None else ():
        if getattr(model, name) % 2:
            raise UserError(
                f"adaptation.base is {config.base}, which stores two numbers in a byte, so model.{name} must be even; "
                f"it is {getattr(model, name)}. Write adaptation=lora."
            )
    return Lora(model, config.rank, config.scale, config.targets, config.layers)
