"""`gemma2 train-together`: trains several students of one teacher in one program."""

import argparse

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb
from gemma2_jax.cli.student_options import add_students, compose_students

DESCRIPTION = """\
Trains several students at once on the same batches, in one compiled step. The teacher's forward pass is computed once
for all of them, so three students cost less than three separate runs. Each student gets its own run folder and the same
result as in a separate run, except for rounding. The same command resumes an interrupted run; students that are behind
the others catch up first. A student's speed (tokens_per_second, mfu) is its own tokens divided by the time that all
students take together.

Give the shared keys first, then each student as --student NAME with its own keys: model, optimizer, objective,
initialise, seed, and the layers to match (distill.match). Data, tokenizer, teacher, mesh, layout, compute,
training.steps, accumulation, eval_batches and log_every are shared. On-policy students (distill.on_policy) are refused:
train each with gemma2 train. A baseline on text alone can run in the same program: give it distill.teacher=null (if the
others use a cache, also distill.cache=null distill.encoding=null).

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
    add_students(parser, "one student: its name and its own keys")


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
