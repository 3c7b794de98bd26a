"""What the verbs' parsers have in common; imports nothing heavy, so that --help answers at once."""

import argparse
from collections.abc import Callable
from typing import Any

Verbs = Any  # argparse's own class for subparsers is private

KEYS = """\
the commonest keys:
  experiment=quickstart/teacher   a named experiment; the keys after it override it
  model=small_6m                  the model's sizes; model.num_layers=8 changes one of them
  data.source='my/*.txt'          text of your own (.txt .md .rst .jsonl .parquet, also .gz .zst); give a
                                  new data.folder with it
  training.steps=1000             optimizer steps
  optimizer.learning_rate=1e-3    the peak of the schedule
  seed=1                          other initial weights (data.seed=1: another order of the data)
  output=runs/mine                the run's folder
`gemma2 config list` names the choices of each group, `gemma2 config show` prints every key with its value.
"""


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    description: str,
    epilog: str = "",
    resumes: bool = False,
) -> argparse.ArgumentParser:
    """Adds a parser to `verbs`; `resumes` says that the same command goes on after it was stopped."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, resumes=resumes)
    return parser


def add_actions(verbs: Verbs, name: str, help: str, description: str) -> Verbs:
    """Adds a verb that has actions of its own, such as `gemma2 data prepare`; returns what they are added to."""
    parser = verbs.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(shown=parser)
    return parser.add_subparsers(metavar="ACTION")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that compose a configuration: key=value and --config-dir."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what to change in the configuration"
    )
    add_config_dir(parser)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder of your own with groups (DIR/model/NAME.yaml) and experiments (DIR/experiments/NAME.yaml)",
    )
