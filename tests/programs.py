"""Looking into traced programs."""

from collections.abc import Iterator
from typing import Any

import jax.extend


def arrays(jaxpr: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shape and size of every array that a program computes, those inside its loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "shape"):
                yield variable.aval.shape, variable.aval.size
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays(inner)
