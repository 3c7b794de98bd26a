"""A trace of some steps: what the host and the devices do when, for xprof and TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax

from gemma2_jax.run import RunConfig

FOLDER = "profile"  # in a run folder


class Profile:
    """Traces the steps that `training.profile_steps` chooses, if `profile` is set. A context manager.

    Within a step, the stages of the model are named scopes: embed, attention,
    mlp, final_norm, teacher, loss, match, optimizer.

    Args:
        say: tells the user where the trace is.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._first, self._last = config.training.profile_steps if config.profile else (0, 0)
        self._folder, self._say = Path(config.output, FOLDER), say
        self._taken = 0  # steps of this process
        self._since: int | None = None  # the step of the run that the trace begins with

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._since is not None:
            self._finish()
        elif self._taken < self._first and error is None:
            self._say(
                f"no step was traced: {self._taken} were left, and training.profile_steps begins with {self._first}"
            )

    @contextmanager
    def step(self, number: int, settle: Callable[[], None]) -> Iterator[None]:
        """Around step `number` of the run; `settle` waits until the devices have done it."""
        self._taken += 1
        if self._taken == self._first:
            jax.profiler.start_trace(self._folder)
            self._since = number
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._taken == self._last:
            settle()
            self._finish()

    def _finish(self) -> None:
        jax.profiler.stop_trace()
        self._say(
            f"a trace from step {self._since} on is in {self._folder}: pip install xprof; xprof --logdir {self._folder}"
        )
        self._since = None
