"""What a sweep tries: sweep.yaml as a dataclass, the values of each key, and the points of grids and random draws."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gemma2_jax.config import UserError, refuse, suggest
from gemma2_jax.messages import quoted, written

METHODS = ("grid", "list", "random", "qmc", "tpe")
SAMPLED = ("random", "qmc", "tpe")  # methods that draw `trials` points from the space
WITH_OPTUNA = ("qmc", "tpe")
ADAPTIVE = ("tpe",)  # methods that draw a point from the results of earlier ones
KINDS = ("range", "uniform", "log_uniform", "int")
LARGER_IS_BETTER = {"cross_entropy": False, "perplexity": False, "kl": False, "agreement": True}  # by metric
MOST_TRIALS = 10_000  # all are composed before the first one starts
_MOST_CORNERS = 64
_DIGITS = 6  # significant digits of a sampled number, which is part of its run's name


@dataclass(frozen=True)
class Choices:
    """A key with a list of values, each as it is written after `key=`."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A key with the numbers from `low` to `high`, both included."""

    kind: Literal["uniform", "log_uniform", "int"]
    low: float
    high: float

    def at(self, fraction: float) -> str:
        """Returns the number at a fraction, from 0 to below 1, of the interval's probability."""
        if self.kind == "int":
            return str(int(self.low + math.floor(fraction * (self.high - self.low + 1))))
        if self.kind == "log_uniform":
            return self.text(math.exp(math.log(self.low) + fraction * math.log(self.high / self.low)))
        return self.text(self.low + fraction * (self.high - self.low))

    def text(self, number: float) -> str:
        """Returns the number as it is written after `key=`."""
        if self.kind == "int":
            return str(int(number))
        return repr(min(max(float(f"{number:.{_DIGITS}g}"), self.low), self.high))


Axis = Choices | Interval


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: one trial for each combination of values, list of overrides, or draw from a space.

    Attributes:
        method: `grid` tries all combinations of the space's values; `list` tries `runs`; `random`, `qmc` (a
            quasi-random sequence) and `tpe` (tree-structured Parzen estimator) draw `trials` points from the space.
        title: the question that the sweep answers.
        experiment: the experiment that configures the trials, as in `gemma2 train experiment=NAME`.
        overrides: `key=value` overrides of all trials.
        space: for each key a list of values, or a mapping of one of `range`, `uniform`, `log_uniform` and `int` to its
            bounds.
        runs: for `list`, the overrides of each trial by its name.
        trials: number of points to draw.
        seeds: seeds (`seed` and `data.seed`) that each trial is trained with. Empty: the seeds of the configuration.
        metric: what trials are compared by: cross_entropy, perplexity, kl or agreement, on the validation split.
        rungs: steps before the last one after which only the best trials continue (successive halving).
        reduction: at each rung, one of `reduction` trials continues.
        brackets: number of groups of trials (Hyperband); the first starts at the first rung, the second at the second
            one, and so on.
        parallel: for `tpe`, a trial is drawn from the results of all trials except the last `parallel` - 1 before it,
            which may still be running.
        sampler_seed: seed of the draws.
    """

    method: str
    title: str = ""
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    space: dict[str, tuple[str | bool | int | float | None, ...] | dict[str, tuple[int | float, ...]]] = (
        field(default_factory=dict)
    )
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trials: int | None = None
    seeds: tuple[int, ...] = ()
    metric: str = "cross_entropy"
    rungs: tuple[int, ...] = ()
    reduction: int = 3
    brackets: int = 1
    parallel: int = 4
    sampler_seed: int = 0

    def __post_init__(self) -> None:
        refuse(self._complaints())
        axes(self)

    @property
    def larger_is_better(self) -> bool:
        return LARGER_IS_BETTER[self.metric]

    def _complaints(self) -> Iterator[str]:
        if self.method not in METHODS:
            yield f"method is {self.method}; {suggest(self.method, METHODS)}."
            return
        if self.metric not in LARGER_IS_BETTER:
            yield f"metric is {self.metric}; {suggest(self.metric, LARGER_IS_BETTER)}."
        used, unused = ("runs", "space") if self.method == "list" else ("space", "runs")
        if not getattr(self, used):
            yield f"{used} is empty, but method is {self.method}, which tries what {used} lists."
        if getattr(self, unused):
            yield f"{unused} has no effect, since method is {self.method}; leave it out."
        yield from self._about_names()
        yield from self._about_numbers()
        yield from self._about_rungs()

    def _about_names(self) -> Iterator[str]:
        named = {f"runs.{name}": texts for name, texts in self.runs.items()}
        for name in self.runs:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                yield f"runs.{name} is not a valid name of a trial; accepted: letters, digits, _ and -."
        for where, texts in {"overrides": self.overrides, **named}.items():
            for text in texts:
                if text.partition("=")[0] in ("name", "output"):
                    yield f"{where} has {text}, which has no effect, since the sweep sets it; leave it out."
        given = [text.partition("=")[0] for text in self.overrides]
        if self.experiment is not None:
            given.append("experiment")
        for key in self.space:
            if key in given:
                yield f"{key} is both in space and in {'experiment' if key == 'experiment' else 'overrides'}."
            if self.seeds and key in ("seed", "data.seed"):
                yield f"space.{key} has no effect, since seeds lists the seeds of each trial; leave one of them out."
            if key in ("name", "output", "hosts"):
                yield f"space.{key} cannot be swept, since the sweep sets it; leave it out."
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds is {written(self.seeds)}; each seed may be listed once."

    def _about_numbers(self) -> Iterator[str]:
        if self.method in SAMPLED and self.trials is None:
            yield f"trials is null, but method is {self.method}; set it to the number of points to draw."
        if self.method not in SAMPLED and self.trials is not None:
            yield f"trials has no effect, since method is {self.method}; leave it out."
        least = {"trials": 1, "reduction": 2, "brackets": 1, "parallel": 1, "sampler_seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                yield f"{name} is {value}; it must be at least {smallest}."
        if self.trials is not None and self.trials > MOST_TRIALS:
            yield f"trials is {self.trials:,}; it must be at most {MOST_TRIALS:,}."
        if self.sampler_seed >= 2**32:
            yield f"sampler_seed is {self.sampler_seed}; it must be below 2**32."

    def _about_rungs(self) -> Iterator[str]:
        if any(step < 1 for step in self.rungs) or list(self.rungs) != sorted(set(self.rungs)):
            yield f"rungs is {written(self.rungs)}; it must be a list of increasing steps, as in [100, 300]."
        if self.brackets > len(self.rungs) + 1:
            yield (
                f"brackets is {self.brackets}; it must be at most {len(self.rungs) + 1}, one more than the number of "
                "rungs."
            )


def identity(config: SweepConfig) -> dict[str, object]:
    """Returns what decides which trials a sweep has and which of them are the best, as plain values."""
    free = ("title", "experiment", "overrides")  # the trials' own configurations are compared instead
    return {
        item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.name not in free
    }


def axes(config: SweepConfig) -> dict[str, Axis]:
    """Returns the axes of the sweep's space, by key.

    Raises:
        UserError: an axis is empty or of an unknown kind, lists a value twice, or has wrong bounds.
    """
    found: dict[str, Axis] = {}
    for key, given in config.space.items():
        axis = _described(key, given) if isinstance(given, Mapping) else Choices(tuple(map(written, given)))
        if isinstance(axis, Choices):
            if not axis.values:
                raise UserError(f"space.{key} is empty; list at least one value.")
            twice = [value for value in axis.values if axis.values.count(value) > 1]
            if twice:
                raise UserError(f"space.{key} lists {twice[0]} twice; leave one of them out.")
        elif config.method == "grid":
            raise UserError(
                f"space.{key} is {axis.kind}, which has no grid; list its values, or set method to "
                f"{', '.join(SAMPLED[:-1])} or {SAMPLED[-1]}."
            )
        found[key] = axis
    combined = math.prod(len(axis.values) for axis in found.values() if isinstance(axis, Choices))
    if config.method == "grid" and combined > MOST_TRIALS:
        raise UserError(
            f"space has {combined:,} combinations; a grid has at most {MOST_TRIALS:,}. List fewer values, or set "
            f"method to {', '.join(SAMPLED[:-1])} or {SAMPLED[-1]}."
        )
    return found


def _described(key: str, given: Mapping[str, tuple[int | float, ...]]) -> Axis:
    """Builds an axis from its kind and bounds."""
    for name in given:
        if name not in KINDS:
            raise UserError(f"there is no kind {name} for space.{key}, {suggest(name, KINDS)}.")
    if len(given) != 1:
        raise UserError(f"space.{key} is {quoted(dict(given))}; give exactly one of {', '.join(KINDS)}.")
    ((kind, bounds),) = given.items()
    where = f"space.{key}.{kind} is {written(bounds)}"
    whole = all(isinstance(bound, int) for bound in bounds)
    if kind == "range":
        if not whole or len(bounds) not in (2, 3) or 0 in bounds[2:]:
            raise UserError(
                f"{where}; accepted: [START, STOP] or [START, STOP, STEP], whole numbers without STOP."
            )
        start, stop, step = (*map(int, bounds), 1)[:3]
        count = -((start - stop) // step)
        if count > MOST_TRIALS:
            raise UserError(f"{where}, which is {count:,} values; accepted: at most {MOST_TRIALS:,}.")
        return Choices(tuple(str(number) for number in range(start, stop, step)))
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise UserError(f"{where}; accepted: [LOW, HIGH], the lower number first.")
    low, high = bounds
    if kind == "int":
        if not whole:
            raise UserError(f"{where}; accepted: two whole numbers.")
        return Interval("int", low, high)
    if kind == "uniform":
        return Interval("uniform", low, high)
    if low <= 0:
        raise UserError(f"{where}; both numbers must be above 0.")
    return Interval("log_uniform", low, high)


def grid(space: Mapping[str, Axis]) -> list[dict[str, str]]:
    """Returns all combinations of the listed values, the last key changing fastest."""
    lists = [axis.values for axis in space.values() if isinstance(axis, Choices)]
    assert len(lists) == len(space)
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]


def random_point(space: Mapping[str, Axis], seed: int, number: int) -> dict[str, str]:
    """Returns the random draw of a number, which does not depend on the other draws."""
    generator = np.random.default_rng([seed, number])
    point = {}
    for key, axis in space.items():
        fraction = generator.random()
        if isinstance(axis, Choices):
            point[key] = axis.values[int(fraction * len(axis.values))]
        else:
            point[key] = axis.at(fraction)
    return point


def corners(space: Mapping[str, Axis]) -> list[dict[str, str]]:
    """Returns the combinations of all listed values and of the bounds of intervals.

    If there are many, returns a sample that contains each value at least once.
    """
    ends = {
        key: axis.values if isinstance(axis, Choices) else (axis.text(axis.low), axis.text(axis.high))
        for key, axis in space.items()
    }
    if math.prod(map(len, ends.values())) <= _MOST_CORNERS:
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    generator = np.random.default_rng(0)
    longest = max(_MOST_CORNERS, *map(len, ends.values()))
    columns = [np.resize(generator.permutation(len(values)), longest) for values in ends.values()]
    return [
        {key: values[column[row]] for (key, values), column in zip(ends.items(), columns, strict=True)}
        for row in range(longest)
    ]
