"""Records a trace of some steps, with the timeline of the host and the devices, for xprof and TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax

from gemma2_jax.run import RunConfig

FOLDER = "profile"  # in a run folder


class Profile:
    """Context manager that traces the steps in `training.profile_steps`, if `profile` is set.

    Within a step, the stages of the model are named scopes: embed, attention,
    mlp, final_norm, teacher, loss, match, optimizer.

    Args:
        print_line: prints a line for the user, such as the trace's location.
    """

    def __init__(self, config: RunConfig, print_line: Callable[[str], None]) -> None:
        self._first, self._last = config.training.profile_steps if config.profile else (0, 0)
        self._folder, self._print_line = Path(config.output, FOLDER), print_line
        self._taken = 0  # steps taken by this process
        self._trace_start: int | None = None  # the step of the run at which the open trace began

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trace_start is not None:
            self._finish()
        elif self._taken < self._first and error is None:
            self._print_line(
                f"no step was traced: training.profile_steps starts at step {self._first} of this process, which took "
                f"only {self._taken}"
            )

    @contextmanager
    def step(self, number: int, wait: Callable[[], None]) -> Iterator[None]:
        """Context manager around step `number` of the run; `wait` blocks until the devices have finished the step."""
        self._taken += 1
        if self._taken == self._first:
            jax.profiler.start_trace(self._folder)
            self._trace_start = number
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._taken == self._last:
            wait()
            self._finish()

    def _finish(self) -> None:
        jax.profiler.stop_trace()
        self._print_line(
            f"the trace from step {self._trace_start} on is in {self._folder}; to view it: pip install xprof; "
            f"xprof --logdir {self._folder}"
        )
        self._trace_start = None
