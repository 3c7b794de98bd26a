"""`gemma2 sweep`: every combination of some values."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.studies.sweep import Combination
    from gemma2_jax.training.config import RunConfig

DESCRIPTION = """\
Trains one run for each combination of the keys that list several values, one after another, and compares their
final validation cross-entropies in one table. Combinations that are done are skipped, so the same command goes on
after a stop; one that fails is reported, and the others go on.

  gemma2 sweep experiment=quickstart/scratch optimizer.learning_rate=1e-3,3e-3 seed=0,1    four runs
  gemma2 sweep experiment=quickstart/scratch 'seed=range(0,5)' training.steps=200          five runs
  gemma2 sweep model=small_1m,small_6m output=runs/sweeps/sizes                            groups, too

The runs lie in runs/sweeps/EXPERIMENT/KEYS (the first of these sweeps: runs/sweeps/quickstart/scratch/
optimizer.learning_rate+seed; without an experiment runs/sweeps/train/KEYS), or in the folder output=, each named
by its values, with table.md and results.json beside them.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "sweep", run, "train every combination of some values", DESCRIPTION, KEYS, resumes=True
    )
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from gemma2_jax.sharding.hosts import is_first, join
    from gemma2_jax.studies.sweep import run_sweep
    from gemma2_jax.training.config import RunConfig

    combinations, output = compose_sweep(arguments.overrides, arguments.config_dir)
    join(next(found.config for found in combinations if isinstance(found.config, RunConfig)).hosts)
    return 0 if run_sweep(combinations, output, Console(quiet=not is_first())) else 1


def compose_sweep(overrides: list[str], config_dir: str | None) -> tuple[list["Combination"], str]:
    """Returns the combinations of a sweep, each with its configuration, and the sweep's folder.

    Raises:
        UserError: no key lists several values, one is set by the sweep itself, or none of the combinations can
            be composed.
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
    found = []
    for values in listed:
        name = ",".join(f"{key}={value}" for key, value in values.items())
        folder = str(Path(output) / re.sub(r"[^A-Za-z0-9_.,=+-]", "-", name))
        try:
            chosen = [f"{key}={value}" for key, value in values.items()]
            config: RunConfig | UserError = compose(
                [*shared, *chosen], config_dir, {"name": name, "output": folder}
            )
        except UserError as error:
            config = error
        found.append(Combination(values, config))
    errors = [combination.config for combination in found if isinstance(combination.config, UserError)]
    if len(errors) == len(found):
        raise errors[0]  # a mistake of the command line rather than of one combination
    return found, output
