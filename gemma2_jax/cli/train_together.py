"""`gemma2 train-together`: trains several students of one teacher in one program."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.run import RunConfig

DESCRIPTION = """\
Trains several students at once on the same batches, in one compiled step. The teacher's forward pass is computed once
for all of them, so three students cost less than three separate runs. Each student gets its own run folder and the same
result as in a separate run, except for rounding. The same command resumes an interrupted run, and first trains students
that are behind up to the others. A student's speed (tokens_per_second, mfu) is its own tokens divided by the time that
all students take together.

Give the shared keys first, then each student as --student NAME with its own keys: model, optimizer, objective,
initialise, seed, and the layers to match (distill.match). Data, tokenizer, teacher, mesh, compute, training.steps,
accumulation, eval_batches and log_every are shared. On-policy students (distill.on_policy) are refused: train each with
gemma2 train. A baseline on text alone can train along: give it distill.teacher=null (if the others use a cache, also
distill.cache=null distill.encoding=null).

  gemma2 train-together objective=distillation distill=online distill.teacher=runs/teacher output=runs/family \\
      --student wide model=small_1m \\
      --student deep model=small_1m model.d_model=64 model.num_layers=8 \\
      --student careful model=small_1m optimizer.learning_rate=3e-3 objective=jsd \\
      --student inside model=small_1m distill=match 'distill.match.layers=[[1,3],[3,5]]' \\
      --student scratch model=small_1m objective=cross_entropy distill.teacher=null

  runs/family/wide, runs/family/deep, ...      without output=: runs/wide, runs/deep, ...
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "train-together",
        run,
        "train several students of one teacher at once",
        DESCRIPTION,
        KEYS,
        resumes=True,
    )
    add_overrides(parser)
    parser.add_argument(
        "--student",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "key=value"),
        help="one student: its name and its own keys",
    )


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError
    from gemma2_jax.data.prepare import prepare
    from gemma2_jax.processes.hosts import first_process_first, is_first, join
    from gemma2_jax.training.prerequisites import check_places, check_sources
    from gemma2_jax.training.together import check_together, train_together

    if not arguments.student:
        raise UserError("there is no student to train; name each with --student NAME key=value ….")
    configs = compose_students(arguments.overrides, arguments.student, arguments.config_dir)
    check_together(configs)  # before preparing the data, which may take long
    for config in configs:
        check_places(config)
    join(configs[0].hosts)
    check_sources(configs)
    with first_process_first():
        prepare(configs[0].data, configs[0].tokenizer)
    train_together(configs)
    for config in configs:
        if is_first():
            print(f"{config.output} is trained to step {config.training.steps}.")


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
