"""Measures everything that needs a GPU, within a few minutes: kernels, training, distillation, generation.

    pip install -e '.[cuda12]'                                   # or: pip install -e . 'jax[cuda13]' tokamax absl-py
    pip install torch transformers                               # optional, to compare with
    python experiments/benchmarks/gpu.py --output gpu.json

The sections, with random weights, so that nothing is downloaded:

    kernels   values and gradients of the attention kernels and of the LM head on the device, against the references
    train     a training step of the 2B: one sequence of 8192 tokens, compute=bfloat16, float32 weights and moments
    distil    a step that distils the 2B from a 9B in bfloat16
    decode    prefill of a prompt and greedy decoding by the 2B, with its weights in bfloat16, int8 and int4

"train" and "decode" include Hugging Face transformers on the same device, where torch is installed: eager attention
(its "sdpa" drops the soft cap), recomputed layers as on our side, but weights and moments in bfloat16, so its step has
less to store and to read. The two sides have different random weights; `step_vs_transformers.py` and `decoding.py`
check that they compute the same.

Speeds are medians after a warm-up, whose compile time is reported apart. The share is that of the peak bfloat16 FLOPs
of the device, by model FLOPs (`gemma2_jax/model/counts.py`); in decoding, that of the memory bandwidth. Peak memory is
what JAX (or torch) has allocated at most; the plan is what `gemma2 plan` computes from the compiled step. Each part
runs in a process of its own (`gpu_parts.py`), so that one that fails or runs out of memory is a line with the reason.

Exits with 1 if a kernel's error is above its limit, or nothing could be measured. `--size toy` tries the script on a
CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma2_jax.files import write_text

# Parts of each section, by their names in gpu_parts.py.
SECTIONS = {
    "kernels": ("kernels",),
    "train": ("train", "train_transformers"),
    "distil": ("distil",),
    "decode": ("decode_bfloat16", "decode_int8", "decode_int4", "decode_transformers"),
}
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
NOTHING = "–"


def main() -> None:
    options = parse_options()
    deadline = time.monotonic() + 60 * options.minutes
    machine: Row = {}
    rows: list[Row] = []
    for section in options.sections:
        for part in SECTIONS[section]:
            found = run_part(part, options.size, deadline, options.minutes)
            for row in found:
                machine |= row.pop("machine", {})
            rows += [{"section": section, "part": part, **row} for row in found if row]
    print(", ".join([options.size, *(f"{name} {value}" for name, value in machine.items())]))
    print_tables(rows)
    if options.output:
        write_text(
            options.output, json.dumps({"size": options.size, "machine": machine, "rows": rows}, indent=2)
        )
    if any(is_wrong(row) for row in rows) or all("failure" in row for row in rows):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def sections(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in SECTIONS]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is not a section; accepted: {', '.join(SECTIONS)}"
            )
        return names

    parser.add_argument(
        "--sections", type=sections, default=list(SECTIONS), help="sections, joined by commas (all)"
    )
    parser.add_argument("--size", choices=("2b", "toy"), default="2b", help="sizes of the models (2b)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts together (8)")
    parser.add_argument("--output", help="JSON file for all figures (none)")
    return parser.parse_args()


def run_part(part: str, size: str, deadline: float, minutes: float) -> list[Row]:
    """Runs a part in a new process until the deadline; returns its rows, the last with the reason if it failed."""
    left = deadline - time.monotonic()
    if left <= 0:
        return [failure(part, f"skipped, since the {minutes:g} minutes were over")]
    # Each process has the device for itself, and may take nearly all of its memory.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    if part.endswith("_transformers"):
        environment["JAX_PLATFORMS"] = "cpu"  # leaves the device to torch
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "experiments.benchmarks.gpu_parts", part, size, str(file)]
        try:
            ran = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            reason = f"stopped, since the {minutes:g} minutes were over"
        else:
            last = (ran.stderr.strip().splitlines() or ["without a message"])[-1]
            reason = f"its process ended with {ran.returncode}: {last}" if ran.returncode else ""
        lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines] + ([failure(part, reason)] if reason else [])


def failure(name: str, reason: str) -> Row:
    return {"name": name, "failure": reason}


def is_wrong(row: Row) -> bool:
    """Whether a kernel's values or gradients differ from the reference's by more than the limit."""
    # Written so that NaN is wrong, too.
    return "limit" in row and not max(row["values"], row["gradients"] or 0.0) <= row["limit"]


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
        [row for row in rows if "tokens_per_second" in row],
        {
            "program": lambda row: row["name"],
            "engine": lambda row: row["engine"],
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "ms": lambda row: f"{1e3 * row['seconds']:.1f}",
            "share of peak": lambda row: shown(row["share"], "{:.1%}"),
            "peak GB": lambda row: shown(row["peak_bytes"], "{:.2f}", 1e-9),
            "planned GB": lambda row: shown(row["planned_bytes"], "{:.2f}", 1e-9),
            "compile s": lambda row: shown(row["compile_seconds"], "{:.0f}"),
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
    return NOTHING if value is None else form.format(value * unit)


if __name__ == "__main__":
    main()
