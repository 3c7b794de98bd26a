"""The length of a run, and how often it logs and evaluates."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2_jax.config import refuse


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and when to log and evaluate.

    Attributes:
        steps: optimizer steps of the whole run.
        accumulation: microbatches that each step's batch is split into; they run one after another to save memory.
        log_every: steps between rows of metrics; each row averages over the steps since the previous row.
        eval_every: steps between evaluations on the validation split; the last step is always evaluated.
        eval_batches: maximum number of batches per evaluation; a larger split is sampled, with the same documents
            each time. null evaluates on the whole split.
        profile_steps: the first and the last step that `profile` traces, counted from the first step of the process;
            the first steps of a process are slower than the others.
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
                f"training.profile_steps is [{first}, {last}]; it must be the first and the last step to trace, both "
                "at least 1 and in this order."
            )
        for name in ("steps", "accumulation", "log_every", "eval_every", "eval_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"training.{name} is {value}; it must be at least 1."

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every `every` steps happens after `step` steps; it always does after the last one."""
        return step % every == 0 or step == self.steps
