"""`gemma2 train-together`: several students of one teacher in one run."""

import argparse

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb
from gemma2_jax.cli.students import add_students, compose_students

DESCRIPTION = """\
Trains several runs at once on the same batches, all of them in one compiled step. The teacher's forward pass is
computed once for all of them, so that three students cost less than three runs; each ends as it would alone, but for
rounding, in a folder of its own, and goes on there after a stop. Those that are behind are trained up to the others
first. The speed of each (tokens_per_second, mfu) is that of its own tokens in the time that all of them take together.

What all of them have in common comes first, then each with --student NAME and what is its own: its model, optimizer,
objective, initialise, seed, the layers that it matches (distill.match). Data, tokenizer, teacher, mesh, compute,
training.steps, accumulation, eval_batches and log_every are shared. A student with samples of its own
(distill.on_policy) is trained by itself, with gemma2 train. A baseline from text alone goes along without the teacher:
with distill.teacher=null, and beside students of a cache distill.cache=null distill.encoding=null as well.

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
    add_students(parser, "one run: its name, and what it does not share with the others")


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError
    from gemma2_jax.data.prepare import prepare
    from gemma2_jax.processes.hosts import first_process_first, is_first, join
    from gemma2_jax.training.prerequisites import check_places, check_sources
    from gemma2_jax.training.together import check_together, train_together

    if not arguments.student:
        raise UserError("there is no student to train; name each with --student NAME key=value ….")
    configs = compose_students(arguments.overrides, arguments.student, arguments.config_dir)
    check_together(configs)  # before the data is prepared, which may take long
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
