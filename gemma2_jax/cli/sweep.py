"""`gemma2 sweep`: trains one run for each combination of values."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.studies.sweep import Combination

_SHOWN = 10  # maximum number of invalid combinations in the error message

DESCRIPTION = """\
Trains one run for each combination of the keys that list several values, one after another, and compares the final
validation cross-entropies in one table, also averaged over seeds, and in a plot. All combinations are checked before
the first one starts. Finished runs are skipped, so the same command resumes an interrupted sweep; a failed run is
reported, and the sweep continues with the others.

  gemma2 sweep experiment=quickstart/scratch optimizer.learning_rate=1e-3,3e-3 seed=0,1    four runs
  gemma2 sweep experiment=quickstart/scratch 'seed=range(0,5)' training.steps=200          five runs
  gemma2 sweep model=small_1m,small_6m output=runs/sweeps/sizes                            also for groups

The sweep's folder is runs/sweeps/EXPERIMENT/KEYS (for the first example, runs/sweeps/quickstart/scratch/
optimizer.learning_rate+seed; without an experiment, runs/sweeps/train/KEYS), or the one given by output=. It contains
one run folder per combination, named by its values, and table.md, summary.png, loss.png, results.json and times.json.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "sweep", run, "train one run for each combination of values", DESCRIPTION, KEYS, resumes=True
    )
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from gemma2_jax.config import check_place
    from gemma2_jax.processes.hosts import is_first, join
    from gemma2_jax.studies.sweep import run_sweep
    from gemma2_jax.training.packages import check_packages
    from gemma2_jax.training.prerequisites import check_places, check_sources

    combinations, output = compose_sweep(arguments.overrides, arguments.config_dir)
    check_place("output", output)
    for combination in combinations:
        check_packages(combination.config)
        check_places(combination.config)
    join(combinations[0].config.hosts)
    check_sources(combination.config for combination in combinations)
    return 0 if run_sweep(combinations, output, Console(quiet=not is_first())) else 1


def compose_sweep(overrides: list[str], config_dir: str | None) -> tuple[list["Combination"], str]:
    """Returns the combinations of a sweep, each with its configuration, and the sweep's folder.

    Raises:
        UserError: no key lists several values, the sweep itself sets a given key, or a combination cannot be composed.
    """
    from gemma2_jax.cli.compose import combinations, compose, pairs
    from gemma2_jax.config import UserError
    from gemma2_jax.studies.sweep import Combination

    listed, shared = combinations(overrides)
    if not listed[0]:
        raise UserError("no key lists several values; accepted: at least one key=A,B or key=range(1,4).")
    given = dict(pairs(shared))
    if "name" in given or "name" in listed[0]:
        raise UserError("name= has no effect, since a sweep names each run by its values; leave it out.")
    if "output" in listed[0]:
        raise UserError("output= lists several values, but a sweep has one folder; give one value.")
    keys = "+".join(listed[0])
    output = str(given.get("output", f"runs/sweeps/{given.get('experiment', 'train')}/{keys}"))
    found, refused = [], []
    for values in listed:
        name = ",".join(f"{key}={value}" for key, value in values.items())
        folder = str(Path(output) / re.sub(r"[^A-Za-z0-9_.,=+-]", "-", name))
        chosen = [f"{key}={value}" for key, value in values.items()]
        try:
            group = f"metrics.group={output}"  # a given one comes later and takes precedence
            config = compose([group, *shared, *chosen], config_dir, {"name": name, "output": folder})
        except UserError as error:
            refused.append((name, str(error)))
        else:
            found.append(Combination(values, config))
    if refused:
        raise UserError(_refusal(refused, len(listed)))
    by_folder: dict[str, str] = {}
    for combination in found:
        name, folder = combination.config.name, combination.config.output
        if folder in by_folder:
            raise UserError(
                f"{name} and {by_folder[folder]} would share the folder {folder}; leave one of them out."
            )
        by_folder[folder] = name
    return found, output


def _refusal(refused: list[tuple[str, str]], total: int) -> str:
    """Returns one sentence if all combinations have the same problem, else one for each of the first few."""
    reasons = dict.fromkeys(reason for _, reason in refused)
    if len(refused) == total and len(reasons) == 1:
        return next(iter(reasons))
    lines = [f"  {name}: {reason}" for name, reason in refused[:_SHOWN]]
    if len(refused) > _SHOWN:
        lines.append(f"  and {len(refused) - _SHOWN} more.")
    return "\n".join([f"{len(refused)} of {total} combinations are invalid, so no run was started:", *lines])
