"""`gemma2 teacher-cache`: computes teacher targets for a student's data once, and stores them."""

import argparse
import sys

from gemma2_jax import stops
from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

DESCRIPTION = """\
Runs a teacher once over the rows that a student will be trained on, and stores its output for each token in a few
bytes. Any number of students can then train from the cache without the teacher. Use the command line of the student's
run: its data, batch size and number of steps decide what is computed, and its mesh on which devices.

  gemma2 teacher-cache model=small_1m objective=distillation distill=cached \\
      distill.teacher=runs/teacher distill.cache=runs/teacher-cache
  gemma2 train         model=small_1m objective=distillation distill=cached \\
      distill.teacher=runs/teacher distill.cache=runs/teacher-cache name=student

  gemma2 teacher-cache ... --estimate      estimates size and time from a few steps; prepares the data, as a run
                                           does, and writes nothing else
  gemma2 teacher-cache ... --verify        reads every file and compares it with its checksum

  distill.encoding.kind=sampled            N ids drawn from the teacher's distribution: unbiased (default, N = 50)
  distill.encoding.kind=top_k              the k most likely ids, and the total probability of all others
  distill.encoding.kind=top_p              as few of those k as reach the probability distill.encoding.p
  distill.encoding.kind=full               all ids, for small vocabularies (with distill.encoding.entries=null)
  distill.encoding.entries=256             N, or k

The same command resumes an interrupted cache, and extends it if training.steps is larger. Each process writes and reads
the rows that it feeds: a cache must be read by as many processes as wrote it, and mesh.tensor x mesh.sequence must stay
within one process.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "teacher-cache",
        run,
        "store a teacher's targets for many students",
        DESCRIPTION,
        KEYS,
        resumes=True,
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--estimate", action="store_true", help="print size and time; write no cache")
    only.add_argument("--verify", action="store_true", help="check the files of an existing cache")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.compilation import use_compilation_cache
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
        print(
            "gemma2: loading and compiling the teacher for the missing part of the cache …", file=sys.stderr
        )
    with use_compilation_cache(config.compilation_cache):
        config = with_prepared_vocabulary(config)
        manifest = write_cache(config, arguments.estimate)
    if is_first() and is_complete(config, manifest):
        print(f"{folder} holds teacher targets for {manifest.rows} rows.")
