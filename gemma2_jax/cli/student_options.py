"""Several students on one command line: the shared keys, then each student as --student NAME with its own keys."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma2_jax.run import RunConfig


def add_students(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds the option --student, which is given once per student."""
    parser.add_argument(
        "--student", action="append", nargs="+", default=[], metavar=("NAME", "key=value"), help=help
    )


def compose_students(
    shared: Sequence[str], students: Sequence[Sequence[str]], config_dir: str | None
) -> list["RunConfig"]:
    """Returns the configuration of each student, which is given as its name and its own overrides.

    Raises:
        UserError: a name is invalid or repeated, a key must not be shared or must not be a student's own, or `compose`
            refuses an override.
    """
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import UserError

    folder = _parent_folder(shared)
    names = [name for name, *_ in students]
    configs = []
    for name, *own in students:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or names.count(name) > 1:
            raise UserError(
                f"--student {name} cannot name a run; accepted: letters, digits, _ and -, each name once."
            )
        values = {"name": name, "output": f"{folder}/{name}"}
        try:
            _check_own_keys(own)
            configs.append(compose([*shared, *own], config_dir, values))
        except UserError as error:
            raise UserError(f"--student {name}: {error}") from None
    return configs


def _parent_folder(shared: Sequence[str]) -> str:
    """Returns the parent folder of the run folders."""
    from gemma2_jax.cli.compose import pairs
    from gemma2_jax.config import UserError

    folder = "runs"
    for key, value in pairs(shared):
        if key == "name":
            raise UserError(f"name={value} has no effect, since each --student names its run; leave it out.")
        if key == "output":
            folder = value
    if folder in ("null", ""):
        raise UserError(
            f"output is {folder or 'empty'}; it must be the parent folder of all run folders, as in output=runs/family."
        )
    return str(folder)


def _check_own_keys(own: Sequence[str]) -> None:
    """Raises UserError if a key must not be set for a single student."""
    from gemma2_jax.cli.compose import pairs
    from gemma2_jax.config import UserError

    for key, _ in pairs(own):
        if key in ("name", "output"):
            raise UserError(
                f"{key} is set by the student's name; put output=FOLDER before the first --student."
            )
        if key.split(".")[0] == "hosts":
            raise UserError(f"{key} belongs to the job, not to a student; put it before the first --student.")
        if key == "topology":
            raise UserError(
                "topology belongs to the plan, not to a student; put it before the first --student."
            )
