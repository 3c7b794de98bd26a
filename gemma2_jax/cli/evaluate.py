"""`gemma2 eval`: evaluates checkpoints on text or prepared data."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_jax.cli import eval_tasks
from gemma2_jax.cli.parsers import Verbs, add_config_dir, add_verb

if TYPE_CHECKING:
    from gemma2_jax.evaluation.config import EvaluationConfig
    from gemma2_jax.run import RunConfig

DESCRIPTION = """\
Evaluates checkpoints of any kind: perplexity, bits per byte and calibration; with --teacher also KL, agreement and
acceptance; with --memorisation how many documents are continued as they were written. Several checkpoints are rows of
one table.

  gemma2 eval runs/student                                   its run's validation split, as in training
  gemma2 eval runs/a runs/b google/gemma-2-2b --text books='books/*.txt' code='src/*.md'
  gemma2 eval runs/student --teacher runs/teacher --text notes.jsonl --windows sliding --stride 256
  gemma2 eval weights/2b --adapter runs/lora --adapter hub/adapter --data data/chats --json evaluation.json
  gemma2 eval runs/student --quantize none,int8,int4 --teacher runs/student    what quantisation costs
  gemma2 eval runs/student --memorisation 1000
  gemma2 eval runs/student --tasks offline                   benchmarks: tasks of the evaluation harness, in one process
  gemma2 eval google/gemma-2-2b --tasks arc_easy,gsm8k --limit 100 --samples samples.jsonl
  gemma2 eval weights/9b --text 'books/*.txt' compute=bfloat16 mesh.fsdp=8 mesh.data=1

  --windows document   whole documents, cut into windows of --context tokens that do not overlap; each begins with bos
  --windows sliding    such windows, one every --stride tokens, each of which scores only the tokens not yet scored
  --windows packed     the validation split of prepared data, in rows as in training
Numbers of different kinds of windows, contexts or strides are not comparable. Perplexity is not comparable between
tokenizers, bits per byte is.
"""
EPILOG = """\
keys: mesh, layout and compute (as in gemma2 train; the default is all devices along mesh.data, and float32), hosts,
compilation_cache, data.text_field=NAME and data.skip_invalid=N for files of records; model.sliding_window=N replaces
the window of the models' local layers (null: all layers are global).
"""

_SECTIONS = ("mesh", "layout", "compute", "hosts", "compilation_cache")
_KEYS = ("data.text_field", "data.skip_invalid", "model.sliding_window")
_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "eval", run, "evaluate checkpoints on text or prepared data", DESCRIPTION, EPILOG
    )
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a run folder, a Hugging Face folder or its name on the hub, DeepMind's checkpoint, GGUF, or an adapter",
    )
    _add_text_options(parser)
    eval_tasks.add_arguments(parser)
    add("--teacher", metavar="CHECKPOINT", help="compare each model with this one")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a LoRA adapter for the one CHECKPOINT; may be repeated, and each is a row",
    )
    add(
        "--averaged",
        action="store_true",
        help="take the runs' average of the weights, or each adapter's (training.ema)",
    )
    add(
        "--quantize",
        metavar="FORMAT,…",
        help="formats of the weights: none, int8, int4; each is a row of every checkpoint (not of the teacher)",
    )
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, for checkpoints that come without one")
    add(
        "--memorisation",
        type=int,
        default=0,
        metavar="N",
        help="continue the first 50 tokens of up to N documents of each domain, and compare with their next 50 tokens",
    )
    add("--json", metavar="FILE", help="write all results to FILE as JSON")
    add_config_dir(parser)
    parser.set_defaults(overrides=[])


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="files of text, as data.source; each GLOB, or NAME=GLOB, has a row of its own",
    )
    add("--data", metavar="FOLDER", help="prepared data, whose held-out documents are scored")
    add("--windows", metavar="KIND", help="document (with --text), packed (otherwise) or sliding")
    add(
        "--context",
        type=int,
        metavar="N",
        help="tokens in a window (the run's data.seq_len, or 2048; tasks: 8192)",
    )
    add("--stride", type=int, metavar="N", help="tokens between two sliding windows (half of --context)")
    add("--batch", type=int, metavar="N", help="rows computed at a time (8)")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="score at most N documents of each domain or task (packed: N batches)",
    )


def run(arguments: argparse.Namespace) -> int:
    from gemma2_jax.cli.score_tables import print_scores
    from gemma2_jax.compilation import use_compilation_cache
    from gemma2_jax.config import UserError, check_place
    from gemma2_jax.evaluation.evaluate import evaluate
    from gemma2_jax.processes.hosts import is_first, join
    from gemma2_jax.training.packages import check_packages

    eval_tasks.check_arguments(arguments)
    checkpoints, config, composed = settings(arguments)
    if arguments.json is not None:
        check_place("--json", arguments.json, is_file=True)
        if Path(arguments.json).is_dir():
            raise UserError(f"--json is {arguments.json}, which is a folder; give the name of a file.")
    check_packages(composed)
    join(composed.hosts)
    with _named_as_options(), use_compilation_cache(composed.compilation_cache):
        if arguments.tasks is not None:
            return eval_tasks.run_tasks(arguments, checkpoints, config, show=is_first())
        record = evaluate(checkpoints, config, show=is_first())
    if is_first():
        print_scores(record)
        if arguments.json is not None:
            record.save(arguments.json)
    return 0


def settings(arguments: argparse.Namespace) -> tuple[list[str], "EvaluationConfig", "RunConfig"]:
    """Returns the checkpoints, the settings of their evaluation, and the configuration that key=value composes.

    Raises:
        UserError: an option or a key has a value that is not accepted.
    """
    from gemma2_jax.cli.sections import compose_sections

    given = [*arguments.checkpoints, *arguments.overrides]
    keys = [text for text in given if _OVERRIDE.match(text) and not Path(text).exists()]
    # argparse takes the keys after --text for further globs.
    swallowed = [text for text in arguments.text if _is_key(text) and not Path(text).exists()]
    composed = compose_sections([*keys, *swallowed], arguments.config_dir, "an evaluation", _SECTIONS, _KEYS)
    texts = [text for text in arguments.text if text not in swallowed]
    with _named_as_options():
        config = _config(arguments, composed, texts)
    if any(text.startswith("model.sliding_window=") for text in [*keys, *swallowed]):
        config = replace(config, sliding_window=composed.model.sliding_window)
    return [text for text in given if text not in keys], config, composed


def _is_key(text: str) -> bool:
    """Whether a text is key=value and not NAME=GLOB; names of domains have no dots."""
    key, equals, _ = text.partition("=")
    return bool(equals) and (key in _SECTIONS or re.fullmatch(r"[a-z_]+(\.\w+)+", key) is not None)


def _config(arguments: argparse.Namespace, composed: "RunConfig", texts: Sequence[str]) -> "EvaluationConfig":
    from gemma2_jax.evaluation.config import EvaluationConfig

    return EvaluationConfig(
        text=tuple(texts),
        data=arguments.data,
        windows=arguments.windows,
        context=arguments.context,
        stride=arguments.stride,
        batch=arguments.batch,
        limit=arguments.limit,
        teacher=arguments.teacher,
        adapters=tuple(arguments.adapter),
        averaged=arguments.averaged,
        quantize=_listed(arguments.quantize),
        tokenizer=arguments.tokenizer,
        memorisation=arguments.memorisation,
        text_field=composed.data.text_field,
        skip_invalid=composed.data.skip_invalid,
        compute=composed.compute,
        mesh=composed.mesh,
        layout=composed.layout,
        block_tokens=composed.objective.block_tokens,
    )


def _listed(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(name.strip() for name in text.split(","))


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Replaces the fields in messages of `EvaluationConfig` by the options that set them."""
    from gemma2_jax.config import UserError

    try:
        yield
    except UserError as error:
        message = re.sub(r"evaluation\.(\w+)=(\w+)", r"--\1 \2", str(error))
        message = message.replace("evaluation.adapters", "evaluation.adapter")
        raise UserError(
            re.sub(r"evaluation\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), message)
        ) from None
