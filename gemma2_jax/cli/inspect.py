"""`gemma2 inspect`: what a checkpoint holds."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_verb

DESCRIPTION = """\
Prints what a checkpoint holds, without reading its weights (but for an embedding saved twice, to compare the two):
kind, size, dtype, parameters beside those of the published model, tokenizer, and every tensor that is missing,
of the wrong shape, or superfluous. Exits with 1 if something is wrong with it.

PATH is a run folder, a Hugging Face folder or its name on the hub (from where the weights are fetched into the hub's
cache, gigabytes of them), DeepMind's Orbax checkpoint, or a GGUF file.

  gemma2 inspect runs/quickstart/teacher
  gemma2 inspect downloads/gemma-2-2b
  gemma2 inspect student.gguf
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "inspect", run, "print what a checkpoint of any kind holds", DESCRIPTION)
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
        print(f"{'tensors':<12} complete: all names and shapes are those of the model")
    for problem in found.problems:
        print(f"{'problem':<12} {problem}")
    return 1 if found.problems else 0
