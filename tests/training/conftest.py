"""What the tests of runs share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """A run takes all devices there are; those of a module that uses this take one, to be fast."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield
