"""Where the processes of a job stop together: behind the same step, so that they can save it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma2_jax import stops


class AgreedStop:
    """Asks, in a loop that is the same in all processes, whether a signal to any of them ends it in all."""

    def is_due(self) -> bool:
        """Whether to stop here. All processes ask equally often, in the same places, and get the same answers.

        Several processes agree by a collective: one that waited for another's word by other means would wait for ever,
        if that one has begun a step and waits for its part of it.
        """
        if jax.process_count() == 1:
            return stops.requested()
        number = int(multihost_utils.process_allgather(np.int32(stops.number() or 0)).max())
        if number:
            stops.request(number)
        return number > 0  # a signal that came here meanwhile is not known to the others


@contextmanager
def stopping_together(seconds: float, say: Callable[[str], None]) -> Iterator[AgreedStop]:
    """Around such a loop: a signal is only noted within, for at most `seconds`; see `stops.deferred`."""
    with stops.deferred(seconds, say):
        yield AgreedStop()
