"""`gemma2 config`: shows composed configurations and the available choices."""

import argparse

from gemma2_jax.cli.parsers import KEYS, Verbs, add_actions, add_overrides, add_verb
from gemma2_jax.cli.standard_streams import utf8_output

DESCRIPTION = """\
Shows configurations without running anything.

  gemma2 config list                                    every group with the names it accepts
  gemma2 config list model                              the names of one group
  gemma2 config show experiment=quickstart/distilled    every key with its value
  gemma2 config explain training.eval_every             the meaning of a key
"""
SHOW = """\
Prints the whole configuration of `gemma2 train` with the same arguments, as YAML that `gemma2 train --config FILE`
accepts. --comments adds each key's meaning in a comment above it.

  gemma2 config show
  gemma2 config show model=gemma2_2b optimizer=wsd training.steps=2000
"""
LIST = """\
Prints the names that a group accepts (group=NAME on the command line), or those of all groups.

  gemma2 config list
  gemma2 config list experiment
"""
EXPLAIN = """\
Prints a key's meaning, type and value, and the file that sets it; for a section, lists its keys. With key=value, the
value and the file are those of `gemma2 train` with the same arguments.

  gemma2 config explain
  gemma2 config explain training
  gemma2 config explain optimizer.warmup_steps optimizer=wsd
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "config", "show a configuration, list the choices", DESCRIPTION)
    parser = add_verb(actions, "show", show, "print every key with its value", SHOW, KEYS)
    parser.add_argument("--comments", action="store_true", help="explain each key in a comment above it")
    add_overrides(parser)
    parser = add_verb(actions, "explain", explain, "print what a key means", EXPLAIN)
    parser.add_argument(
        "key", nargs="?", metavar="KEY", help="such as training.steps, or a section, such as training"
    )
    add_overrides(parser)
    parser = add_verb(actions, "list", list_choices, "print the names that groups accept", LIST)
    parser.add_argument("group", nargs="?", help="one group, such as model; all of them if left out")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder of your own whose names are listed too")


def show(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import to_yaml

    config = compose(arguments.overrides, arguments.config_dir)
    text = to_yaml(config)
    if arguments.comments:
        from gemma2_jax.cli.explain import with_comments

        text = with_comments(config)
    with utf8_output():
        print(text, end="")


def explain(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import composed_values
    from gemma2_jax.cli.explain import explain_key

    key, overrides = arguments.key, arguments.overrides
    if key is not None and "=" in key:
        key, overrides = None, [key, *overrides]
    values = composed_values(
        overrides, arguments.config_dir
    )  # unchecked, since they need not form a complete run
    print(explain_key(key, values, overrides, arguments.config_dir))


def list_choices(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import groups
    from gemma2_jax.cli.roots import choices, studies, sweeps
    from gemma2_jax.config import UserError, suggest

    listed = {group: choices(group, arguments.config_dir) for group in groups()}
    listed["study"] = sorted(studies(arguments.config_dir))
    listed["sweep"] = sorted(sweeps(arguments.config_dir))
    if arguments.group is None:
        for group, names in listed.items():
            print(f"{group + ':':<12} {' '.join(names)}")
    elif arguments.group in listed:
        print("\n".join(listed[arguments.group]))
    else:
        raise UserError(f"there is no group {arguments.group}, {suggest(arguments.group, listed)}.")
