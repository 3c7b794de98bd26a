"""Stops a run in the middle, as Ctrl-C does."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gemma2_jax.training.run_folder import Rows, RunFolder


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Interrupts training inside the block after it logs `step`; fails if nothing was interrupted."""
    log = RunFolder.log

    def log_and_die(self: RunFolder, logged: int, rows: Rows, seconds: float) -> None:
        log(self, logged, rows, seconds)
        if logged == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            yield
