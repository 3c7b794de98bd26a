"""Composes a sweep: from keys that list several values, or from sweep.yaml."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma2_jax.cli.compose import combinations, compose, pairs
from gemma2_jax.cli.roots import find_sweep
from gemma2_jax.config import UserError, load_config
from gemma2_jax.studies.samplers import check_optuna, quasi_random_points
from gemma2_jax.studies.space import WITH_OPTUNA, SweepConfig, axes, corners, grid, random_point
from gemma2_jax.studies.trials import Combination, Sweep, Trial, check_trials

_SHOWN = 10  # maximum number of invalid combinations in the error message
_LONGEST = 180  # characters of a run's name, which is that of its folder


def compose_sweep(arguments: Sequence[str], config_dir: str | None = None) -> Sweep:
    """Returns a sweep with all of its trials composed, those of a sampled space's corners too.

    Args:
        arguments: name of the sweep, if it is described by sweep.yaml, and overrides.
        config_dir: folder of your own configs, as `--config-dir`.

    Raises:
        UserError: neither a sweep is named nor does a key list several values, the sweep itself sets a given key, or a
            trial cannot be composed.
    """
    names = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if len(names) > 1:
        raise UserError(f"{names[0]} and {names[1]} both name a sweep; give one name, and key=value.")
    given = _single_values(overrides)
    if names:
        sweep, output, base = _described(names[0], overrides, config_dir)
    else:
        sweep, output, base = _listed(overrides)
    if sweep.method in WITH_OPTUNA:
        check_optuna(sweep.method)
    composer = _Composer(sweep, str(given.get("output", output)), base, config_dir)
    trials = composer.trials()
    earlier = composer.earlier()
    found = Sweep(sweep, composer.output, trials, composer.build, earlier)
    check_trials(found)
    return found


def _single_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the keys with one value. Raises UserError for those that the sweep sets itself."""
    listed, shared = combinations(overrides)
    given = dict(pairs(shared))
    if "name" in given or "name" in listed[0]:
        raise UserError("name= has no effect, since a sweep names each run by its values; leave it out.")
    if given.get("output") == "":
        raise UserError("output is empty; give a folder, as in output=runs/sweeps/mine.")
    if "output" in listed[0]:
        raise UserError("output= lists several values, but a sweep has one folder; give one value.")
    return given


def _listed(overrides: Sequence[str]) -> tuple[SweepConfig, str, list[str]]:
    """Returns a grid of the keys that list several values, its folder, and the other overrides."""
    listed, shared = combinations(overrides)
    if not listed[0]:
        raise UserError(
            "no key lists several values; accepted: at least one key=A,B or key=range(1,4), or the name of a sweep."
        )
    space: dict[str, Any] = {key: tuple(dict.fromkeys(each[key] for each in listed)) for key in listed[0]}
    if len(grid(axes(SweepConfig("grid", space=space)))) < len(listed):
        twice = next(values for values in listed if listed.count(values) > 1)
        shown = ",".join(f"{key}={value}" for key, value in twice.items())
        raise UserError(f"{shown} is listed twice; leave one of them out.")
    given = dict(pairs(shared))
    output = f"runs/sweeps/{given.get('experiment', 'train')}/{'+'.join(space)}"
    return SweepConfig("grid", space=space), output, shared


def _described(
    name: str, overrides: Sequence[str], config_dir: str | None
) -> tuple[SweepConfig, str, list[str]]:
    """Returns the sweep of a name, its folder, and the overrides of all its trials."""
    sweep = load_config(SweepConfig, find_sweep(name, config_dir))
    for where, texts in {"overrides": sweep.overrides, **sweep.runs}.items():
        if listed := combinations(texts)[0][0]:
            raise UserError(
                f"{where} in sweep.yaml lists several values of {next(iter(listed))}; give one value, or list them in "
                "space."
            )
    several = next(iter(combinations(overrides)[0][0]), None)
    if several is not None:
        raise UserError(
            f"{several}= lists several values, but {name} has its own sweep.yaml; give one value."
        )
    for key, value in pairs(overrides):
        if key in sweep.space:
            raise UserError(
                f"{key}={value} has no effect, since sweep.yaml lists the values of {key}; leave it out."
            )
        if sweep.seeds and key in ("seed", "data.seed"):
            raise UserError(f"{key}={value} has no effect, since sweep.yaml lists the seeds; leave it out.")
    base = [] if sweep.experiment is None else [f"experiment={sweep.experiment}"]
    return sweep, f"runs/sweeps/{name}", [*base, *sweep.overrides, *overrides]


class _Composer:
    """Composes the trials of a sweep.

    Args:
        base: overrides of all trials.
    """

    def __init__(self, sweep: SweepConfig, output: str, base: Sequence[str], config_dir: str | None) -> None:
        self._sweep, self.output, self._base, self._config_dir = sweep, output, base, config_dir
        self._built: dict[int, Trial] = {}

    def trials(self) -> list[Trial]:
        """Returns all trials; for a method that draws from results, those of the space's corners.

        Raises:
            UserError: a trial is invalid; for sampled points, also a corner.
        """
        sweep, space = self._sweep, axes(self._sweep)
        if sweep.method == "list":
            return self._all([({"run": name}, own) for name, own in sweep.runs.items()])
        if sweep.method == "grid":
            return self._all([(point, _typed(point)) for point in grid(space)])
        ends = self._all([(point, _typed(point)) for point in corners(space)])
        count = sweep.trials or 0
        if sweep.method == "random":
            points = [random_point(space, sweep.sampler_seed, number) for number in range(count)]
        elif sweep.method == "qmc":
            points = quasi_random_points(space, count, sweep.sampler_seed)
        else:
            return ends
        return self._all([(point, _typed(point)) for point in points], numbered=True)

    def build(self, number: int, point: Mapping[str, str]) -> Trial:
        """Returns the trial of a number, whose point is always the same."""
        if number not in self._built:
            self._built[number] = self._trial(point, _typed(point), number)
        return self._built[number]

    def earlier(self) -> str | None:
        """Returns the folder where a single run of the same experiment would be; None if it cannot be composed."""
        try:
            return compose(
                [text for text in self._base if not text.startswith("output=")], self._config_dir
            ).output
        except UserError:  # what it lacks is in the space
            return None

    def _all(
        self, points: Sequence[tuple[Mapping[str, str], Sequence[str]]], numbered: bool = False
    ) -> list[Trial]:
        found, refused = [], []
        for number, (values, own) in enumerate(points):
            try:
                found.append(self._trial(values, own, number if numbered else None))
            except UserError as error:
                refused.append((_name(values, None), str(error)))
        if refused:
            raise UserError(_refusal(refused, len(points)))
        _check_folders(run for trial in found for run in trial)
        return found

    def _trial(self, values: Mapping[str, str], own: Sequence[str], number: int | None) -> Trial:
        seeds = self._sweep.seeds
        runs = []
        for seed in seeds or (None,):
            shown = dict(values) if seed is None else {**values, "seed": str(seed)}
            name = _name(shown, number)
            folder = str(Path(self.output) / re.sub(r"[^A-Za-z0-9_.,=+-]", "-", name))
            settings: dict[str, Any] = {"name": name, "output": folder}
            if not any(text.startswith("metrics.group=") for text in (*self._base, *own)):
                settings["metrics.group"] = self.output
            if seed is not None:
                settings |= {"seed": seed, "data.seed": seed}
            runs.append(Combination(shown, compose([*self._base, *own], self._config_dir, settings)))
        return tuple(runs)


def _typed(point: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in point.items()]


def _name(values: Mapping[str, str], number: int | None) -> str:
    """Returns the name of a run: its values, after the trial's number if that is needed to tell trials apart."""
    given = dict(values)
    parts = [] if number is None else [f"{number:03}"]
    parts += [given.pop("run")] if "run" in given else []
    name = ",".join([*parts, *_typed(given)])
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{digest}"


def _check_folders(runs: Any) -> None:
    by_folder: dict[str, str] = {}
    for run in runs:
        name, folder = run.config.name, run.config.output
        if folder in by_folder:
            raise UserError(
                f"{name} and {by_folder[folder]} would share the folder {folder}; leave one of them out."
            )
        by_folder[folder] = name


def _refusal(refused: Sequence[tuple[str, str]], total: int) -> str:
    """Returns one sentence if all combinations have the same problem, else one for each of the first few."""
    reasons = dict.fromkeys(reason for _, reason in refused)
    if len(refused) == total and len(reasons) == 1:
        return next(iter(reasons))
    lines = [f"  {name}: {reason}" for name, reason in refused[:_SHOWN]]
    if len(refused) > _SHOWN:
        lines.append(f"  and {len(refused) - _SHOWN} more.")
    return "\n".join([f"{len(refused)} of {total} combinations are invalid, so no run was started:", *lines])
