"""`gemma2 sweep`: trains one run for each combination of values."""

import argparse
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import KEYS, Verbs, add_config_dir, add_verb

if TYPE_CHECKING:
    from gemma2_jax.studies.trials import Sweep

DESCRIPTION = """\
Trains one run for each combination of the keys that list several values, or for each trial of a sweep.yaml, and
compares the final validation cross-entropies in one table, also averaged over seeds, and in a plot. All combinations
are checked before the first one starts. Finished runs are skipped, so the same command resumes an interrupted sweep; a
failed run is reported, and the sweep continues with the others.

  gemma2 sweep experiment=quickstart/scratch optimizer.learning_rate=1e-3,3e-3 seed=0,1    four runs
  gemma2 sweep experiment=quickstart/scratch 'seed=range(0,5)' training.steps=200          five runs
  gemma2 sweep model=small_1m,small_6m output=runs/sweeps/sizes                            also for groups
  gemma2 sweep learning_rate --dry-run                  experiments/learning_rate/sweep.yaml: its trials and their cost
  gemma2 sweep learning_rate --workers 2                two processes on this machine
  gemma2 sweep distill=online objective=distillation distill.teacher=runs/teacher \\
      optimizer.learning_rate=1e-3,3e-3,1e-2 --together   three students, one forward pass of the teacher

The same command in another terminal, or on another host that shares the folder, joins the sweep as one more worker. Any
worker may be stopped or killed at any time; the others train what it leaves.

The sweep's folder is runs/sweeps/NAME, or without a name runs/sweeps/EXPERIMENT/KEYS (for the first example,
runs/sweeps/quickstart/scratch/optimizer.learning_rate+seed; without an experiment, runs/sweeps/train/KEYS), or the one
given by output=. It contains one run folder per combination, named by its values, and table.md, summary.png, loss.png,
results.json and journal.jsonl, in which the workers note what they have done.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "sweep", run, "train one run for each combination of values", DESCRIPTION, KEYS, resumes=True
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="NAME or key=value",
        help="the name of a sweep with a sweep.yaml, and overrides of the configuration",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the trials and their cost, and run nothing"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="number of processes on this machine (1)"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="train the runs that share data and teacher as students of one program, in groups that fit the memory",
    )
    add_config_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    import jax
    from rich.console import Console

    from gemma2_jax.cli.compose_sweep import compose_sweep
    from gemma2_jax.cli.sweep_groups import check_groups, with_groups
    from gemma2_jax.config import UserError, check_place
    from gemma2_jax.processes.hosts import is_first, join
    from gemma2_jax.studies.sweep import run_sweep
    from gemma2_jax.studies.sweep_cost import describe_cost
    from gemma2_jax.studies.tables import print_line
    from gemma2_jax.studies.workers import started_workers
    from gemma2_jax.training.packages import check_packages
    from gemma2_jax.training.prerequisites import check_places, check_sources

    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1.")
    sweep = compose_sweep(arguments.overrides, arguments.config_dir)
    check_place("output", sweep.output)
    configs = [each.config for trial in sweep.trials for each in trial]
    for config in configs:
        check_packages(config)
        check_places(config)
    if arguments.together:
        check_groups(sweep)
    if arguments.dry_run:
        print_trials(sweep)
        print(describe_cost(sweep, arguments.workers))
        return 0
    join(configs[0].hosts)
    if arguments.workers > 1 and jax.process_count() > 1:
        raise UserError(
            f"--workers is {arguments.workers}, but this is a job of {jax.process_count()} processes, which are one "
            "worker together; leave it out."
        )
    check_sources(configs)
    console = Console(quiet=not is_first())
    if arguments.together:
        sweep = with_groups(sweep)
        sizes = ", ".join(str(len(group)) for group in sweep.groups)
        print_line(console, f"groups of {sizes} runs, each with one forward pass of the teacher")
    print_line(console, describe_cost(sweep, arguments.workers))
    own = [*arguments.overrides, *(["--together"] if arguments.together else [])]
    own += [] if arguments.config_dir is None else ["--config-dir", arguments.config_dir]
    with started_workers(["sweep", *own], arguments.workers - 1, sweep.output, console):
        return 0 if run_sweep(sweep, console) else 1


def print_trials(sweep: "Sweep") -> None:
    """Prints a line for each run, or for a method that draws from results, for each corner of the space."""
    if sweep.is_adaptive:
        print(f"{sweep.total} trials, each drawn from the results of earlier ones, such as:")
    for trial in sweep.trials:
        for each in trial:
            print(" ".join(f"{key}={value}" for key, value in each.values.items()))
    print(f"in {sweep.output}")
