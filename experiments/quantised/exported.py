"""Measures what the runs of the study lose in their exported format, against the unquantised student.

    python experiments/quantised/exported.py

Each run in runs/quantised (or --runs) that was trained for q4_0 is exported to GGUF, and the tensors of that file, read
by the package gguf, are scored; those for int4 are loaded in four bits. The same is done with the unquantised student
("not trained"). Recovered is 1 - KL / KL of that one.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import gguf
import jax
import jax.numpy as jnp
import numpy as np

import gemma2_jax as g2
from gemma2_jax.config import load_config
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.evaluation.scores import Scores, build_scoring, score, scores_of
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.language_modelling import MODEL
from gemma2_jax.model.weights import abstract_params, value_at, weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

STUDENT = Path("runs/quickstart/distilled")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quantised"), help="folder of the study")
    study = parser.parse_args().runs
    student, _ = g2.load(STUDENT)
    naive = {name: scored(exported(STUDENT, name, study), student) for name in ("q4_0", "int4")}
    found = defaultdict(list)
    for folder in sorted(path.parent for path in study.glob("*/config.yaml")):
        name = load_config(RunConfig, folder / "config.yaml").adaptation.quantize
        assert name is not None
        kind = folder.name.rsplit("-", 1)[0]
        found[name, kind].append(scored(exported(folder, name, study), student))
    print("| format | run | KL to the student | perplexity | agreement % | recovered % |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, scores in naive.items():
        print(f"| {name} | not trained | {numbers([scores], name, naive)} |")
    for (name, kind), each in found.items():
        print(f"| {name} | {kind} | {numbers(each, name, naive)} |")


def exported(folder: Path, name: str, study: Path) -> g2.Gemma2:
    """The model of a run in the format that is exported."""
    if name == "int4":
        return g2.load(folder, quantize="int4")[0]
    file = study / f"{folder.name}.gguf"
    if not file.exists():
        g2.convert(folder, file, dtype="q4_0")
    return of_gguf(file, g2.load(folder)[0])


def of_gguf(file: Path, like: g2.Gemma2) -> g2.Gemma2:
    """The model in a GGUF file, its tensors dequantised; `like` has its sizes."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    specs = weight_specs(like.config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(specs))
    for name, entry in expand(GGUF, specs).items():
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        for place, weight in zip(entry.places, entry.split(values.reshape(entry.shape)), strict=True):
            value_at(params, place.path)[... if place.pair is None else place.pair] = weight
    return g2.Gemma2(like.config, jax.tree.map(jnp.asarray, params))


def scored(model: g2.Gemma2, teacher: g2.Gemma2) -> Scores:
    """The model's scores on the student's validation split, with KL(teacher || model)."""
    config = load_config(RunConfig, STUDENT / "config.yaml")
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    models = {MODEL: model, TEACHER: teacher}
    lengths = g2.load(STUDENT)[1].byte_lengths()
    with jax.set_mesh(mesh):
        scoring = build_scoring(config.compute, config.objective.block_tokens)
        return scores_of(score(scoring, models, validation_batches(config.data, 0, 1), lengths, mesh))


def numbers(each: list[Scores], name: str, naive: dict[str, Scores]) -> str:
    """The cells of a row: means, with standard deviations over several seeds."""
    columns = {
        ".5f": [scores.kl for scores in each],
        ".3f": [scores.perplexity for scores in each],
        ".1f": [100 * scores.agreement for scores in each],
        ".0f": [100 * (1 - scores.kl / naive[name].kl) for scores in each],
    }
    return " | ".join(
        format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")
        for form, values in columns.items()
    )


if __name__ == "__main__":
    try:
        main()
    except (g2.UserError, FileNotFoundError) as error:
        sys.exit(f"exported.py: {error}")
