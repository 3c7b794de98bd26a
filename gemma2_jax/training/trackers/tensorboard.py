"""TensorBoard: event files in RUN/tensorboard. The runs of a sweep are folders of one `--logdir`."""

from collections.abc import Mapping

from gemma2_jax.training.trackers.tracker import TrackedRun, named_by_split


class TensorBoard:
    """Writes event files, with tags such as `train/loss`."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.last_step + 1)

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        for name, value in named_by_split(split, row).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
