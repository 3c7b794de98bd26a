"""`gemma2 convert`: converts a checkpoint from one tool's format to another's."""

import argparse
from typing import TYPE_CHECKING

from gemma2_jax.cli.conversion_bar import conversion_bar
from gemma2_jax.cli.parsers import Verbs, add_format, add_verb

if TYPE_CHECKING:
    from gemma2_jax.formats.litert import LiteRTSettings

DESCRIPTION = """\
Converts a checkpoint to another format, reads the result back, compares every weight, and only then moves the result to
TARGET.

SOURCE is a Hugging Face folder (or its name on the hub, with the extra `hub`), DeepMind's Orbax checkpoint, a run
folder, a GGUF file, or a LoRA adapter: a run folder of adaptation=lora or PEFT's folder. The format of TARGET is
  GGUF            if TARGET ends in .gguf: one file for llama.cpp (extra `gguf`), and a Modelfile for Ollama beside it
  LiteRT-LM       if TARGET ends in .litertlm: one file for phones and browsers (extra `litert`)
  Hugging Face    if SOURCE is a run folder: a folder for transformers' AutoModelForCausalLM and AutoTokenizer
  run folder      otherwise: for train (initialise.source), distill.teacher and generate
unless --to chooses another. Weights are copied bit for bit unless --dtype names another dtype; a SOURCE with several
dtypes becomes float32, which represents them all exactly. A LiteRT-LM file holds float32, or the format of --quantize.
An adapter becomes PEFT's with --to peft, or with --merge a complete model, in the dtype of its base model.

  gemma2 convert google/gemma-2-2b-it weights/2b-it
  gemma2 convert downloads/gemma2-9b weights/9b --tokenizer downloads/tokenizer.model
  gemma2 convert runs/student exported/student --dtype bfloat16
  gemma2 convert runs/student student.gguf --dtype q8_0
  gemma2 convert runs/student small.gguf --dtype q4_k_m --calibrate 'notes/**/*.md'
  gemma2 convert runs/student student.litertlm --quantize int8 --context 2048
  gemma2 convert small.gguf weights/small
  gemma2 convert runs/student exported/averaged --averaged
  gemma2 convert runs/lora exported/adapter --to peft
  gemma2 convert runs/lora exported/merged --merge
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "convert", run, "convert a checkpoint to another tool's format", DESCRIPTION)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the checkpoint to read")
    add("target", metavar="TARGET", help="the file or folder to write; must not exist yet")
    add_format(parser, ", instead of the default above", "default: as in SOURCE")
    add("--merge", action="store_true", help="write a complete model from an adapter and its base model")
    add("--base", metavar="RUN", help="an adapter's base model, instead of the one that the adapter names")
    add(
        "--calibrate",
        metavar="DATA",
        help="text files or prepared data on which the K types measure the importance of weights",
    )
    litert = parser.add_argument_group("a LiteRT-LM file")
    litert.add_argument(
        "--quantize", choices=("int8", "int4"), help="format of all matrices (default: float32)"
    )
    litert.add_argument(
        "--prefill",
        metavar="T,...",
        help="numbers of tokens of a prompt that run at a time (default: 128,1024)",
    )
    litert.add_argument(
        "--context", metavar="N", type=int, help="tokens of a chat, replies included (default: 4096)"
    )
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, for a source that comes without one")
    add("--averaged", action="store_true", help="take a run's average of the weights (training.ema)")


def _litert(arguments: argparse.Namespace) -> "LiteRTSettings | None":
    """The settings of a LiteRT-LM file; None if no option gives one."""
    from gemma2_jax.config import UserError
    from gemma2_jax.formats.litert import LiteRTSettings

    given = {
        name: value
        for name in ("quantize", "prefill", "context")
        if (value := getattr(arguments, name)) is not None
    }
    if not given:
        return None
    if "prefill" in given:
        try:
            given["prefill"] = tuple(int(part) for part in given["prefill"].split(","))
        except ValueError:
            raise UserError(
                f"--prefill is {given['prefill']!r}; accepted: numbers of tokens with commas between, such as "
                "--prefill 128,1024."
            ) from None
    return LiteRTSettings(**given)


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.evaluation.calibration import Calibration
    from gemma2_jax.formats.convert import convert

    with conversion_bar() as show:
        done = convert(
            arguments.source,
            arguments.target,
            arguments.to,
            arguments.dtype,
            arguments.tokenizer,
            arguments.merge,
            arguments.base,
            arguments.averaged,
            None if arguments.calibrate is None else Calibration(arguments.calibrate),
            _litert(arguments),
            show,
        )
    several = f" (from {' and '.join(done.source_dtypes)})" if len(done.source_dtypes) > 1 else ""
    print(
        f"{arguments.target}: {done.weights} weights from {arguments.source} ({done.source}) as {done.target}, "
        f"{done.dtype}{several}; read back and compared."
    )
    print("".join(f"{note}.\n" for note in done.notes), end="")
