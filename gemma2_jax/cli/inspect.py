"""`gemma2 inspect`: prints the content of a checkpoint."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_verb

DESCRIPTION = """\
Prints the content of a checkpoint: kind, size, dtype, number of parameters (beside that of the published model),
tokenizer, and every tensor that is missing, unexpected or of the wrong shape. Exits with 1 if something is wrong. The
weights are not read, except to compare an embedding that is saved twice.

PATH is a run folder, a Hugging Face folder or its name on the hub (this downloads gigabytes of weights into the hub's
cache), PEFT's folder of a LoRA adapter, DeepMind's Orbax checkpoint, or a GGUF file. An adapter is shown with its base.

  gemma2 inspect runs/quickstart/teacher
  gemma2 inspect downloads/gemma-2-2b
  gemma2 inspect student.gguf
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "inspect", run, "print the content of any checkpoint", DESCRIPTION)
    parser.add_argument("path", metavar="PATH", help="the checkpoint")


def run(arguments: argparse.Namespace) -> int:
    from gemma2_jax.cli.roots import choices, config_roots
    from gemma2_jax.config import load_config
    from gemma2_jax.formats.inspection import inspect
    from gemma2_jax.model.config import ModelConfig

    folder = config_roots()[0] / "model"
    published = [name for name in choices("model") if name.startswith("gemma2_")]
    found = inspect(
        arguments.path, {name: load_config(ModelConfig, folder / f"{name}.yaml") for name in published}
    )
    for name, text in found.lines:
        print(f"{name:<12} {text}")
    if not found.problems:
        print(f"{'tensors':<12} complete: all names and shapes match the model")
    for problem in found.problems:
        print(f"{'problem':<12} {problem}")
    return 1 if found.problems else 0
