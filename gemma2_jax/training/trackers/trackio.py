"""trackio: a local database and dashboard (`trackio show`); TRACKIO_SPACE_ID sends the rows to a Hugging Face Space."""

import contextlib
import contextvars
import sys
from collections.abc import Mapping

from gemma2_jax.training.trackers.tracker import TrackedRun, kept_id, named_by_split


class Trackio:
    """Writes to a run of a project.

    trackio finds a run by its name alone, so the name ends in the beginning of the id in RUN/trackio.id: a run of the
    same name in another folder stays apart. The rows after the last checkpoint of an interrupted run are in its record
    twice, with equal values. trackio has no tags; they are in the run's configuration.
    """

    def __init__(self, run: TrackedRun, project: str) -> None:
        import trackio

        def init() -> "trackio.Run":
            return trackio.init(
                project=project,
                name=f"{run.name}-{kept_id(run, 'trackio.id')[:6]}",
                group=run.group,
                config=dict(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        # `init` ends the previous run of the same context, so each run has a context of its own.
        with contextlib.redirect_stdout(sys.stderr):
            self._run = contextvars.copy_context().run(init)

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        self._run.log(named_by_split(split, row), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
