"""Measures everything that needs a GPU, within a few minutes: kernels, training, distillation, generation.

    pip install -e '.[cuda12]'                                   # or: pip install -e . 'jax[cuda13]' tokamax absl-py
    pip install torch transformers                               # optional, to compare with
    python experiments/benchmarks/gpu.py --output gpu.json

The parts, with random weights, so that nothing is downloaded:

    kernels   values and gradients of the attention kernels and of the LM head on the device, against the references
    train     a training step of the 2B: one sequence of 8192 tokens, compute=bfloat16, float32 weights and moments
    distil    a step that distils the 2B from a 9B in bfloat16
    decode    prefill of a prompt and greedy decoding by the 2B, with its weights in bfloat16, int8 and int4

"train" and "decode" also run in Hugging Face transformers on the same device, where torch is installed: eager attention
(its "sdpa" drops the soft cap), recomputed layers as on our side, but weights and moments in bfloat16, so its step has
less to store and to read. The two sides have different random weights; `step_vs_transformers.py` and `decoding.py`
check that they compute the same.

Times are medians after a warm-up: of values and gradients for the kernels, of a whole step, of prefill, of decoding the
further tokens. The share is that of the device's peak bfloat16 FLOPs, by model FLOPs (`gemma2_jax/model/counts.py`); in
decoding, that of its memory bandwidth. Peak memory is the most that JAX (or torch) has allocated, for the initial
weights, too; the plan is what `gemma2 plan` computes from the compiled step, and a step whose plan is larger than the
device's memory is skipped.

Each part runs in a process of its own (`gpu_parts.py`), which has the whole device. One that fails, or takes longer
than its share of the time that is left, is a line with the reason. Exits with 1 if a kernel's error is above its limit,
or nothing could be measured. `--size toy` tries the script on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gemma2_jax.files import write_text
from gemma2_jax.machine import is_installed

# The parts in `gpu_parts.py`, and their shares of the time: compiling a step takes longest.
SHARES = {
    "kernels": 4,
    "train": 4,
    "train_transformers": 2,
    "distil": 4,
    "decode_bfloat16": 2,
    "decode_int8": 2,
    "decode_int4": 2,
    "decode_transformers": 2,
}
PACKAGES = ("jax", "tokamax", "torch", "transformers")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="parts to run (all)")
    parser.add_argument("--size", choices=("2b", "toy"), default="2b", help="sizes of the models (2b)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts together (8)")
    parser.add_argument("--output", help="JSON file for all figures (none)")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes

    machine = run_part("machine", options.size, deadline - time.monotonic())[-1]
    if "failure" in machine:
        sys.exit(f"JAX cannot use a device here: {machine['failure']}.")
    if machine["platform"] == "cpu" and options.size != "toy":
        sys.exit(
            "JAX finds no GPU here, only a CPU; install its CUDA wheels, or try the script with --size toy."
        )
    machine |= {name: metadata.version(name) for name in PACKAGES if is_installed(name)}
    rows: list[Row] = []
    for number, part in enumerate(options.parts):
        share = SHARES[part] / sum(SHARES[each] for each in options.parts[number:])
        rows += run_part(part, options.size, share * (deadline - time.monotonic()))
        if options.output:  # after each part, in case that this process is stopped
            found = {"size": options.size, "machine": machine, "rows": rows}
            write_text(options.output, json.dumps(found, indent=2))
    print(
        ", ".join([options.size, machine["device"], *(f"{x} {machine[x]}" for x in PACKAGES if x in machine)])
    )
    print_tables(rows)
    if any(is_wrong(row) for row in rows) or all("failure" in row for row in rows):
        sys.exit(1)


def run_part(part: str, size: str, limit: float) -> list[Row]:
    """Runs a part in a new process for at most `limit` seconds; returns its rows, and the reason if it failed."""
    # It has the device to itself, so JAX may take nearly all of the memory; in torch's parts, JAX keeps off the device.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    if part.endswith("_transformers"):
        environment["JAX_PLATFORMS"] = "cpu"
    reason = ""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part, size, str(file)]
        with open(log, "w") as output:
            # A session of its own, so that its compilers end with it.
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                if code := process.wait(max(limit, 0)):
                    last = (log.read_text(errors="replace").strip().splitlines() or ["without a message"])[-1]
                    reason = f"its process ended with {code}: {last}"
            except subprocess.TimeoutExpired:
                reason = f"stopped after {limit:.0f} s, its share of the time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return [*rows, {"part": part, "name": part, "failure": reason}] if reason else rows


def is_wrong(row: Row) -> bool:
    """Whether a kernel's values or gradients differ from the reference's by more than the limit."""
    # Written so that NaN is wrong, too.
    return "limit" in row and not (
        row["values"] <= row["limit"] and (row["gradients"] or 0.0) <= row["limit"]
    )


def print_tables(rows: Sequence[Row]) -> None:
    """Prints kernels, speeds and failures as tables in Markdown; those without rows are left out."""
    print_table(
        [row for row in rows if "limit" in row],
        {
            "kernel": lambda row: row["name"],
            "error of values": lambda row: f"{row['values']:.1e}",
            "of gradients": lambda row: shown(row["gradients"], "{:.1e}"),
            "limit": lambda row: f"{row['limit']:.0e}{' EXCEEDED' if is_wrong(row) else ''}",
            "ms": lambda row: f"{1e3 * row['seconds']:.2f}",
        },
    )
    print_table(
        [row for row in rows if "engine" in row],
        {
            "program": lambda row: row["name"],
            "engine": lambda row: row["engine"],
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "ms": lambda row: f"{1e3 * row['seconds']:.1f}",
            "share of peak": lambda row: shown(row["share"], "{:.1%}"),
            "peak GB": lambda row: shown(row["peak_bytes"], "{:.2f}", 1e-9),
            "planned GB": lambda row: shown(row.get("planned_bytes"), "{:.2f}", 1e-9),
            "compile s": lambda row: shown(row.get("compile_seconds"), "{:.0f}"),
        },
    )
    print_table(
        [row for row in rows if "failure" in row],
        {"not measured": lambda row: row["name"], "reason": lambda row: row["failure"]},
    )


def print_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> None:
    if rows:
        print(f"\n| {' | '.join(columns)} |")
        print("|" + " --- |" * len(columns))
        for row in rows:
            print(f"| {' | '.join(cell(row).replace('|', '/') for cell in columns.values())} |")


def shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value * unit)


if __name__ == "__main__":
    main()
