"""A stop of all processes of a job after the same step, so that they can save it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma2_jax import stops


class AgreedStop:
    """Decides, in a loop that is the same in all processes, whether a signal to any of them stops all."""

    def is_due(self) -> bool:
        """Whether to stop here. All processes call it equally often at the same places, and get the same answers.

        Several processes agree by a collective. If one waited for another in any other way, it would wait forever for a
        process that has already begun a step and is waiting for it there.
        """
        if jax.process_count() == 1:
            return stops.requested()
        number = int(multihost_utils.process_allgather(np.int32(stops.number() or 0)).max())
        if number:
            stops.request(number)
        return number > 0  # not `stops.requested()`: a signal may have arrived here since the others agreed


@contextmanager
def stopping_together(seconds: float, notify: Callable[[str], None]) -> Iterator[AgreedStop]:
    """Context manager around such a loop: a signal is only recorded, for at most `seconds` (see `stops.deferred`)."""
    with stops.deferred(seconds, notify):
        yield AgreedStop()
