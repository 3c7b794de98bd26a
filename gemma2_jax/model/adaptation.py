"""How a model's weights are divided into trained and frozen ones."""

from typing import Any, Protocol

import jax

from gemma2_jax.model.weights import Params


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
