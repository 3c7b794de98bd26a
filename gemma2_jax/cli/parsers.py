"""Shared parts of the verbs' parsers; imports nothing heavy, so that --help is fast."""

import argparse
from collections.abc import Callable
from typing import Any

Verbs = Any  # argparse's class for subparsers is private

KEYS = """\
common keys:
  experiment=quickstart/teacher   a named experiment; other keys override its values
  model=small_6m                  the model's sizes; model.num_layers=8 changes one of them
  data.source='my/*.txt'          your own text (.txt .md .rst .jsonl .parquet, also .gz .zst); set a new
                                  data.folder too
  training.steps=1000             optimizer steps
  optimizer.learning_rate=1e-3    peak of the schedule
  seed=1                          other initial weights (data.seed=1: another data order)
  output=runs/mine                the run's folder
`gemma2 config list` lists the choices of each group, `gemma2 config show` prints every key and its value.
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
    """Adds a parser to `verbs`; with `resumes`, repeating the command resumes an interrupted one."""
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
    """Adds a verb with actions, such as `gemma2 data prepare`; returns the object to which actions are added."""
    parser = verbs.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(help_parser=parser)
    return parser.add_subparsers(metavar="ACTION")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that compose a configuration: key=value and --config-dir."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    add_config_dir(parser)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder of your own with groups (DIR/model/NAME.yaml) and experiments (DIR/experiments/NAME.yaml)",
    )


def add_format(parser: argparse.ArgumentParser, to: str, dtype: str) -> None:
    """Adds the options --to and --dtype of a checkpoint to write; `to` and `dtype` complete their help."""
    parser.add_argument(
        "--to", choices=("run", "huggingface", "gguf", "litert", "peft"), help=f"the format of TARGET{to}"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"),
        help=f"dtype of the weights in TARGET ({dtype}); those that begin with q are for GGUF",
    )
