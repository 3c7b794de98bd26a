"""How long a run trains, and how often it reports."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2_jax.config import refuse


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and when to look.

    Attributes:
        steps: optimizer steps of the whole run.
        accumulation: microbatches that each step's batch is split into, one after another, to save memory.
        log_every: steps between rows of metrics, each an average since the row before.
        eval_every: steps between evaluations on the validation split; the last step is always evaluated.
        eval_batches: the most batches that an evaluation takes; of a larger split, the same sample of its documents
            each time. None takes the whole split.
        profile_steps: the first and the last step that `profile` traces, counted from where the process begins, whose
            first steps are slower than the others.
    """

    steps: int
    accumulation: int
    log_every: int
    eval_every: int
    profile_steps: tuple[int, int] = (3, 5)  # Older runs lack this key.
    eval_batches: int | None = None  # Older runs lack this key.

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        first, last = self.profile_steps
        if not 1 <= first <= last:
            yield (
                f"training.profile_steps is [{first}, {last}]; it must be the first step to trace, at least 1, and the "
                "last."
            )
        for name in ("steps", "accumulation", "log_every", "eval_every", "eval_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"training.{name} is {value}; it must be at least 1."
