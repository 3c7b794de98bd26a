"""Measures the K types of GGUF: their errors, the speed of packing, and the memory for converting a model.

    pip install -e '.[gguf]'
    python experiments/benchmarks/gguf_packing.py

The first table is about normally distributed weights: bits per weight, relative root-mean-square error, and millions of
weights packed per second, the best of --rounds rounds. Q4_0, which the package gguf packs, is there for comparison.

Then the script writes a Hugging Face folder of random bfloat16 weights with the sizes of --model (the 2B by default:
5.2 GB on disk, deleted at the end), and converts it, each time in a new process. The second table gives the peak memory
of the whole process, Python and libraries included, and the seconds taken, which include reading the source again and
comparing every byte.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from import_memory import parser_of, sizes, write
from merge_memory import tokenizer
from shared import print_peak, print_peaks

from gemma2_jax.formats import k_quants
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.source import TOKENIZER_FILE

ENCODINGS = ("q6_k", "q4_k_m")


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    if kind in k_quants.BYTES:
        return k_quants.pack(values, kind)
    packed: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    return packed


def measure_packing(kind: str, rows: int, rounds: int) -> tuple[float, float, float]:
    """Returns bits per weight, the relative error, and millions of weights per second."""
    values = np.random.default_rng(0).standard_normal((rows, 2304), np.float32)
    packed = pack(values, kind)  # compiles
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        pack(values, kind)
        seconds.append(time.perf_counter() - start)
    error = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()]) - values
    relative = np.sqrt(np.square(error).mean() / np.square(values).mean())
    return 8 * packed.nbytes / values.size, float(relative), values.size / min(seconds) / 1e6


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="of 2,304 weights, in the first table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--convert", nargs=2, metavar=("FOLDER", "ENCODING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        config = sizes(arguments.model, arguments.shrink)
        write(Path(arguments.write), config)
        Path(arguments.write, TOKENIZER_FILE).write_bytes(tokenizer(config.vocab_size))
        return
    if arguments.convert:
        folder, encoding = arguments.convert
        print_peak(lambda: convert(Path(folder), Path(folder, f"{encoding}.gguf"), dtype=encoding))
        return
    print(f"{'':12}{'bits':>12}{'error':>12}{'M weights/s':>14}")
    for kind in ("q4_0", *k_quants.BYTES):
        bits, error, speed = measure_packing(kind, arguments.rows, arguments.rounds)
        print(f"{kind:12}{bits:>12.4f}{error:>12.2%}{speed:>14.1f}", flush=True)
    command = [sys.executable, __file__, "--model", arguments.model, "--shrink", str(arguments.shrink)]
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*command, "--write", name], check=True)
        print()
        print_peaks([*command, "--convert", name], ENCODINGS)


if __name__ == "__main__":
    main()
