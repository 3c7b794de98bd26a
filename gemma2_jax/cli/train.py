"""`gemma2 train`: trains one run."""

import argparse

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

DESCRIPTION = """\
Trains one model, on text alone or with a teacher. If the run has already started, resumes from its newest checkpoint.
If the data or the tokenizer do not exist, they are created first.

  gemma2 train experiment=quickstart/teacher output=runs/teacher
  gemma2 train model=small_1m objective=distillation distill=online distill.teacher=runs/teacher name=student
  gemma2 train --config runs/student/config.yaml                  repeats or resumes a run
  gemma2 train --config runs/student/config.yaml seed=1 output=runs/student-1

The run's folder contains config.yaml (all keys and values), metrics.jsonl, tensorboard/ and checkpoints/.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "train", run, "train one model, or resume its training", DESCRIPTION, KEYS, resumes=True
    )
    parser.add_argument(
        "--config", metavar="FILE", help="start from a run's config.yaml instead of the config groups"
    )
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.checkpoints.store import latest_step
    from gemma2_jax.cli.compose import compose, compose_file
    from gemma2_jax.data.prepare import prepare
    from gemma2_jax.processes.hosts import first_process_first, is_first, join
    from gemma2_jax.training.loop import train
    from gemma2_jax.training.packages import check_packages
    from gemma2_jax.training.prerequisites import check_places, check_sources

    if arguments.config:
        config = compose_file(arguments.config, arguments.overrides)
    else:
        config = compose(arguments.overrides, arguments.config_dir)
    check_packages(config)
    check_places(config)
    join(config.hosts)
    check_sources([config])
    with first_process_first():
        prepare(config.data, config.tokenizer)
    done = latest_step(config.output) == config.training.steps
    train(config)
    if is_first():
        print(f"{config.output} {'was' if done else 'is'} trained to step {config.training.steps}.")
