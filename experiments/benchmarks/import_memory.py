"""Measures the memory for reading a released checkpoint.

    python experiments/benchmarks/import_memory.py

Writes a Hugging Face folder of random bfloat16 weights with the sizes of --model (the 2B by default: 5.2 GB on disk,
deleted at the end), and reads it onto this machine's first device, once per dtype, each time in a new process. The
table gives the size of the weights (on a CPU, they are part of the process's memory), the increase of the process's
peak memory, and the excess of that peak over the weights, in units of the checkpoint's largest tensor.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from gemma2_jax.config import load_config
from gemma2_jax.formats.convert import SHARD_BYTES
from gemma2_jax.formats.huggingface import write_shards
from gemma2_jax.formats.huggingface_config import CONFIG_FILE, config_json
from gemma2_jax.formats.layouts import HUGGINGFACE, expand
from gemma2_jax.formats.load import load_params, open_source
from gemma2_jax.machine import peak_memory_gib
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.vocabulary import without_padding
from gemma2_jax.model.weights import weight_specs

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
DTYPES = ("bfloat16", "float32")


def write(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """Writes a Hugging Face folder of this model, with random weights."""
    shapes = {name: entry.shape for name, entry in expand(HUGGINGFACE, weight_specs(config)).items()}
    draw = np.random.default_rng(seed)

    def tensors() -> Iterator[tuple[str, list[np.ndarray]]]:
        for name, shape in shapes.items():
            yield name, [draw.standard_normal(shape, np.float32).astype("bfloat16")]

    write_shards(folder, tensors(), shapes, "bfloat16", SHARD_BYTES)
    (folder / CONFIG_FILE).write_text(json.dumps(config_json(config, "bfloat16")))


def read(folder: Path, dtype: str) -> dict[str, float]:
    """Returns the GB of the weights, of the rise in peak memory and of the largest tensor, and the seconds taken."""
    source = open_source(folder)
    jax.block_until_ready(jax.numpy.zeros(1))
    before = peak_memory_gib()
    start = time.perf_counter()
    params = load_params(source, source.config, dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    largest = max(math.prod(info.shape) * np.dtype(info.dtype).itemsize for info in source.tensors.values())
    return {
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "peak": (peak_memory_gib() - before) * 2**30 / 1e9,
        "largest": largest / 1e9,
        "seconds": seconds,
    }


def sizes(name: str, shrink: int) -> ModelConfig:
    config = without_padding(load_config(ModelConfig, CONFIGS / f"{name}.yaml"))
    if shrink == 1:
        return config
    return replace(config, vocab_size=config.vocab_size // shrink, d_ff=config.d_ff // shrink, num_layers=4)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that choose the sizes, and `--write`, for the child process that writes the weights."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma2_2b", help="a name in configs/model")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide vocabulary and feed-forward width by N and use 4 layers, to try the script",
    )
    # A child's peak memory includes its parent's, so the parent only waits.
    parser.add_argument("--write", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(Path(arguments.write), sizes(arguments.model, arguments.shrink))
        return
    if arguments.read:
        print(json.dumps(read(Path(arguments.read[0]), arguments.read[1])))
        return
    command = [sys.executable, __file__, "--model", arguments.model, "--shrink", str(arguments.shrink)]
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*command, "--write", name], check=True)
        print(f"{'':12}{'weights GB':>12}{'peak GB':>12}{'excess':>12}{'seconds':>12}")
        for dtype in DTYPES:
            completed = subprocess.run([*command, "--read", name, dtype], check=True, stdout=subprocess.PIPE)
            figures = json.loads(completed.stdout)
            excess = (figures["peak"] - figures["weights"]) / figures["largest"]
            print(
                f"{dtype:12}{figures['weights']:>12.2f}{figures['peak']:>12.2f}{excess:>11.2f}x"
                f"{figures['seconds']:>12.1f}"
            )


if __name__ == "__main__":
    main()
