"""`gemma2 watch`: shows runs in progress."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_verb

DESCRIPTION = """\
Shows the runs at or below folders in a table that is updated every two seconds: state, step, loss, validation
cross-entropy, speed and time left. Ctrl-C ends it; the runs go on.

  gemma2 watch                        all runs in runs/
  gemma2 watch runs/sweeps/lr
  gemma2 watch --once runs/a runs/b   prints the table once; so does a pipe

States: running; starting (no row of metrics yet); stalled (a process works on the run, but has written no row for 5
minutes and for five times the usual time); stopped (no process works on it); failed (in a sweep); finished.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "watch", run, "show runs in progress in the terminal", DESCRIPTION)
    parser.add_argument(
        "folders",
        nargs="*",
        default=["runs"],
        metavar="FOLDER",
        help="run folders, or folders above some (runs)",
    )
    parser.add_argument("--once", action="store_true", help="print the table once")


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.reports.watch import watch_runs

    watch_runs(arguments.folders, arguments.once)
