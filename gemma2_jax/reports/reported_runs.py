"""What a report shows: runs and evaluations, whatever kind of folder they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2_jax.training.metrics import is_count


@dataclass(frozen=True)
class TextSample:
    """A completion of a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        name: a name that no other run of the report has.
        folder: the run folder.
        config: its configuration as plain data; empty if the run failed before it was written.
        rows: its metrics, one mapping per line of metrics.jsonl.
        scores: its last scores on the validation split, by name (`cross_entropy` in nats, `perplexity`, `kl` in nats,
            `agreement` as a fraction), and `parameters` and `tokens_seen`, as far as they are known.
        whole_split: whether the scores are those of the whole validation split; else those of the last validation in
            training, which may use part of it.
        values: values that a sweep sets, by key; empty for other runs.
        samples: completions of prompts.
        flops_per_token: model FLOPs of a training step per token; None if they are unknown.
        data: identity of the prepared data; None if it is unknown.
        error: why the run failed; None if it has not failed.
    """

    name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    whole_split: bool = False
    values: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[TextSample] = ()
    flops_per_token: float | None = None
    data: str | None = None
    error: str | None = None

    @property
    def steps(self) -> int | None:
        """The configured number of steps; None if it is unknown."""
        return count_setting(self.config, "training.steps")

    @property
    def step(self) -> int:
        """The last step that has a row of metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its last step."""
        return self.error is None and self.steps is not None and self.step >= self.steps

    @property
    def cross_entropy(self) -> float | None:
        """Cross-entropy on the validation split in nats; None if the run has no validation."""
        return self.scores.get("cross_entropy")


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        title: heading of the report.
        sources: the paths that were given.
        runs: the runs, with distinct names.
        machines: descriptions of the machines, without repetitions.
        evaluations: results of `gemma2 eval`, by file.
        notes: sentences about what is missing or damaged, for the reader of the report.
    """

    title: str
    sources: Sequence[str]
    runs: Sequence[Run]
    machines: Sequence[str] = ()
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def counted(report: Report) -> str:
    """Returns how many runs and evaluations a report has: 3 runs and 1 evaluation."""
    counts = {"run": len(report.runs), "evaluation": len(report.evaluations)}
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def setting(config: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key in plain data; None if it is absent."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def count_setting(config: Mapping[str, Any], key: str) -> int | None:
    """Returns the whole number that a dotted key has in plain data; None if it is absent or something else."""
    value = setting(config, key)
    return value if is_count(value) else None


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the values of nested plain data by dotted key; lists count as values."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found


def short_name(values: Mapping[str, str]) -> str:
    """Returns values on one line as KEY=VALUE, with the last part of each key where that is unambiguous."""
    ends = [key.split(".")[-1] for key in values]
    short = [end if ends.count(end) == 1 else key for key, end in zip(values, ends, strict=True)]
    return " ".join(f"{key}={value}" for key, value in zip(short, values.values(), strict=True))
