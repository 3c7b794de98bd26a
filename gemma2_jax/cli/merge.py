"""`gemma2 merge`: merges several models into one."""

import argparse

from gemma2_jax.cli.conversion_bar import conversion_bar
from gemma2_jax.cli.parsers import Verbs, add_format, add_verb

DESCRIPTION = """\
Merges models of the same sizes and tokenizer into a new one, reads the result back, compares every weight, and only
then moves the result to TARGET. Tensors are read one at a time.

  linear   the weighted mean of the models
  slerp    spherical interpolation between two models, or with --base between their differences from it
  task     the base plus the weighted sum of the models' differences from it
  ties     trims each difference to its largest numbers, and averages those with the elected sign
  liti     a point between the base (--weights 0) and one model (--weights 1)

  gemma2 merge runs/seed0 runs/seed1 merged --method linear --weights 0.5 0.5
  gemma2 merge runs/a runs/b merged --method slerp --base weights/2b-it
  gemma2 merge runs/code runs/law merged --method ties --base weights/2b-it --density 0.2
  gemma2 merge runs/tuned merged.gguf --method liti --base weights/2b-it --weights 0.7
  gemma2 merge runs/lora_a runs/lora_b adapter --method linear --to peft
  gemma2 merge runs/seed0 runs/seed1 merged --method linear --averaged

MODEL and BASE are checkpoints of any kind that `gemma2 convert` reads; a LoRA adapter counts as the complete model.
TARGET becomes a Hugging Face folder, or GGUF if it ends in .gguf, unless --to chooses another format. Tokenizer, stop
tokens and chat template are those of the first MODEL.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "merge", run, "merge several models into one", DESCRIPTION)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="the checkpoints to merge")
    add("target", metavar="TARGET", help="the file or folder to write; must not exist yet")
    add("--method", required=True, metavar="NAME", help="linear, slerp, task, ties or liti")
    add(
        "--weights",
        nargs="+",
        metavar="W",
        help="one number per MODEL (1 each); for linear, slerp and ties only their ratios matter",
    )
    add("--base", metavar="BASE", help="the checkpoint that the models were tuned from")
    add("--density", type=float, metavar="X", help="fraction of each difference that ties keeps (0.2)")
    add_format(
        parser,
        "; peft merges LoRA adapters into one adapter",
        "that of the models, or float32 if they differ",
    )
    add("--averaged", action="store_true", help="take each MODEL's average of the weights (training.ema)")
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, in place of those of all models")


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.formats.merge import merge

    with conversion_bar() as show:
        done = merge(
            arguments.models,
            arguments.target,
            arguments.method,
            None if arguments.weights is None else _numbers(arguments.weights),
            arguments.base,
            arguments.density,
            arguments.to,
            arguments.dtype,
            arguments.tokenizer,
            arguments.averaged,
            show,
        )
    models = " and ".join(arguments.models)
    print(
        f"{arguments.target}: {done.weights} weights, {arguments.method} merge of {models}, as {done.target}, "
        f"{done.dtype}; read back and compared."
    )
    print("".join(f"{note}.\n" for note in done.notes), end="")


def _numbers(texts: list[str]) -> list[float]:
    """Reads numbers that are separated by spaces or commas."""
    from gemma2_jax.config import UserError

    found = []
    for text in ",".join(texts).split(","):
        try:
            found.append(float(text))
        except ValueError:
            raise UserError(
                f"--weights has {text!r}, which is not a number; write MODELS and TARGET first, as in gemma2 merge A B "
                "TARGET --method linear --weights 0.5 0.5."
            ) from None
    return found
