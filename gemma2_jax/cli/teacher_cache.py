"""`gemma2 teacher-cache`: a teacher's signal over a student's data, computed once."""

import argparse
import sys

from gemma2_jax import stops
from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

DESCRIPTION = """\
Runs a teacher once over the rows that a student will be trained on, and stores its output for each token in a few
bytes. Any number of students then train from the cache without the teacher. Give the command line of the
student's run; its data, batch, number of steps and mesh decide what is computed, and where.

  gemma2 teacher-cache model=small_1m objective=distillation distill=cached \\
      distill.teacher=runs/teacher distill.cache=runs/teacher-cache
  gemma2 train         model=small_1m objective=distillation distill=cached \\
      distill.teacher=runs/teacher distill.cache=runs/teacher-cache name=student

  gemma2 teacher-cache ... --estimate      what it would take, from a few steps; prepares the data, as a run
                                           does, and writes nothing else
  gemma2 teacher-cache ... --verify        reads every file and compares it with its checksum

  distill.encoding.kind=sampled            N ids drawn by the teacher's probability: unbiased (the default, N = 50)
  distill.encoding.kind=top_k              the k likeliest ids and the probability of all others
  distill.encoding.entries=256             N, or k

A cache that was stopped goes on where it was, and grows if training.steps does. Several processes each write and read
the rows that they feed: as many as have written a cache can train from it, and mesh.tensor x mesh.sequence must stay
within a process.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "teacher-cache", run, "run a teacher once, for many students", DESCRIPTION, KEYS, resumes=True
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--estimate", action="store_true", help="print size and time, and write no cache")
    only.add_argument("--verify", action="store_true", help="check the files of a cache that is there")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.compilation import programs_kept_in
    from gemma2_jax.data.prepare import prepare
    from gemma2_jax.distill.cache.manifest import verify_cache
    from gemma2_jax.processes.hosts import first_process_first, is_first, join
    from gemma2_jax.training.packages import check_packages
    from gemma2_jax.training.prerequisites import check_places
    from gemma2_jax.training.start import with_prepared_vocabulary
    from gemma2_jax.training.teacher_cache import (
        check_cache_settings,
        check_teacher,
        is_complete,
        write_cache,
    )

    config = compose(arguments.overrides, arguments.config_dir)
    folder = check_cache_settings(config)
    if arguments.verify:
        with stops.resuming(lambda: ""):
            count = verify_cache(folder)
        print(f"{folder}: {count} files were read; all match their checksums.")
        return
    check_packages(config)
    check_places(config)
    join(config.hosts)
    check_teacher(config)
    with first_process_first():
        prepare(config.data, config.tokenizer)
    if is_first():
        print("gemma2: loading and compiling the teacher for what the cache lacks …", file=sys.stderr)
    with programs_kept_in(config.compilation_cache):
        config = with_prepared_vocabulary(config)
        manifest = write_cache(config, arguments.estimate)
    if is_first() and is_complete(config, manifest):
        print(f"{folder} holds the teacher's signal for {manifest.rows} rows.")
