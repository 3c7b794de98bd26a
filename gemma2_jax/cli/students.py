"""Several students on one command line: what they share, then each with --student NAME and its own keys."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma2_jax.run import RunConfig


def add_students(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds the option that gives a student, once for each."""
    parser.add_argument(
        "--student", action="append", nargs="+", default=[], metavar=("NAME", "key=value"), help=help
    )


def compose_students(
    shared: Sequence[str], students: Sequence[Sequence[str]], config_dir: str | None
) -> list["RunConfig"]:
    """The configuration of each student, given as its name and its own overrides.

    Raises:
        UserError: a name that is none or is given twice, a key that is not a student's or not theirs together, or
            what `compose` refuses.
    """
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import UserError

    folder = _folder_of_all(shared)
    names = [name for name, *_ in students]
    configs = []
    for name, *own in students:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or names.count(name) > 1:
            raise UserError(
                f"--student {name} cannot name a run; accepted: letters, digits, _ and -, each name once."
            )
        values = {"name": name, "output": f"{folder}/{name}"}
        try:
            _check_own(own)
            configs.append(compose([*shared, *own], config_dir, values))
        except UserError as error:
            raise UserError(f"--student {name}: {error}") from None
    return configs


def _folder_of_all(shared: Sequence[str]) -> str:
    """The folder that the runs' folders are in."""
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
            f"output is {folder or 'empty'}; it must be a folder for those of all runs, as in output=runs/family."
        )
    return str(folder)


def _check_own(own: Sequence[str]) -> None:
    """Raises UserError if a student is given a key that cannot be its own."""
    from gemma2_jax.cli.compose import pairs
    from gemma2_jax.config import UserError

    for key, _ in pairs(own):
        if key in ("name", "output"):
            raise UserError(f"{key} follows from the student's name; give output=FOLDER before the students.")
        if key.split(".")[0] == "hosts":
            raise UserError(f"{key} belongs to the job and not to a student; give it before the students.")
        if key == "topology":
            raise UserError("topology belongs to the plan and not to a student; give it before the students.")
