"""A run that is stopped in the middle, as by Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest

from gemma2_jax.training.trainer import Trainer


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Whatever is trained inside is interrupted when it has logged `step`; fails if nothing was."""
    log = Trainer._log

    def log_and_die(self: Trainer, rows: list[dict[str, jax.Array]], seconds: float) -> None:
        log(self, rows, seconds)
        if self.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            yield
