"""Weights & Biases. WANDB_MODE=offline keeps everything in RUN/wandb, for `wandb sync` later."""

from collections.abc import Mapping

from gemma2_jax.training.trackers.tracker import TrackedRun, kept_id, named_by_split

_LONGEST_GROUP = 128  # characters


class Wandb:
    """Writes to a run of a project, resumed by the id in RUN/wandb.id. Runs trained together each have their own.

    wandb ignores a step that it already has. That is harmless: the rows that an interrupted run sent after its last
    checkpoint equal those that the resumed run sends again.
    """

    def __init__(self, run: TrackedRun, project: str) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=kept_id(run, "wandb.id"),
            name=run.name,
            group=None if run.group is None else run.group[-_LONGEST_GROUP:],
            tags=list(run.tags),
            dir=run.folder,
            resume="allow",
            reinit="create_new",  # by default, a second run of one process ends the first
            config=dict(run.config),
        )

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        self._run.log(named_by_split(split, row), step=step)

    def close(self) -> None:
        self._run.finish()
