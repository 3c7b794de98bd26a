"""`gemma2 config`: what a command line composes to, and what there is to choose from."""

import argparse

from gemma2_jax.cli.parsers import KEYS, Verbs, add_actions, add_overrides, add_verb

DESCRIPTION = """\
Shows configurations without running anything.

  gemma2 config list                                    every group with the names it accepts
  gemma2 config list model                              the names of one group
  gemma2 config show experiment=quickstart/distilled    every key with its value
"""
SHOW = """\
Prints the whole configuration of `gemma2 train` with the same arguments, as YAML; saved to a file, it is what
`gemma2 train --config FILE` takes.

  gemma2 config show
  gemma2 config show model=gemma2_2b optimizer=wsd training.steps=2000
"""
LIST = """\
Prints the names that a group accepts (group=NAME on the command line), or those of all groups.

  gemma2 config list
  gemma2 config list experiment
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "config", "show a configuration, list the choices", DESCRIPTION)
    add_overrides(add_verb(actions, "show", show, "print every key with its value", SHOW, KEYS))
    parser = add_verb(actions, "list", list_choices, "print the names that groups accept", LIST)
    parser.add_argument("group", nargs="?", help="one group, such as model; all of them if left out")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder of your own whose names are listed too")


def show(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import to_yaml

    config = compose(arguments.overrides, arguments.config_dir)
    print(to_yaml(config), end="")


def list_choices(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import groups
    from gemma2_jax.cli.roots import choices, studies
    from gemma2_jax.config import UserError, suggest

    listed = {group: choices(group, arguments.config_dir) for group in groups()}
    listed["study"] = sorted(studies(arguments.config_dir))
    if arguments.group is None:
        for group, names in listed.items():
            print(f"{group + ':':<12} {' '.join(names)}")
    elif arguments.group in listed:
        print("\n".join(listed[arguments.group]))
    else:
        raise UserError(f"there is no group {arguments.group}, {suggest(arguments.group, listed)}.")
