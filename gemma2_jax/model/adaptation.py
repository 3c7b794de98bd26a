"""How a model is made of weights that are trained and weights that are frozen."""

from typing import Any, Protocol

import jax

from gemma2_jax.model.weights import Params


class Adaptation(Protocol):
    """Divides a model's weights into what is trained and what is frozen, and puts them together again.

    Every method works with every adaptation. Both parts are nested dicts; either may be empty, and the trained part may
    hold weights of its own, described by specs of its own.
    """

    def specs(self, model: Any) -> tuple[Any, Any]:
        """The specs of the trained and of the frozen part, from those of the whole model (`weight_specs`)."""

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        """The trained and the frozen part of a model that begins with `params`; new weights are drawn from `key`."""

    def join(self, trained: Params, frozen: Params) -> Params:
        """The parameters that `Gemma2` takes. It runs within each step, and gradients go through it."""


class Full:
    """All weights are trained."""

    def specs(self, model: Any) -> tuple[Any, Any]:
        return model, {}

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return params, {}

    def join(self, trained: Params, frozen: Params) -> Params:
        return trained


FULL = Full()
