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

        Several processes agree by a collective. If one waited for another by other means, it would wait forever for a
        process that has already begun a step and waits for it there.
        """
        if jax.process_count() == 1:
            return stops.requested()
        number = int(multihost_utils.process_allgather(np.int32(stops.number() or 0)).max())
        if number:
            stops.request(number)
        return number > 0  # the others do not know of a signal that has just come here


@contextmanager
def stopping_together(seconds: float, notify: Callable[[str], None]) -> Iterator[AgreedStop]:
    """Around such a loop: only records a signal, for at most `seconds`; see `stops.deferred`."""
    with stops.deferred(seconds, notify):
        yield AgreedStop()
