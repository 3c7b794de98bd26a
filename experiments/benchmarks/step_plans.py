"""Plans training steps of the released sizes on TPU pods: peak memory, compile time, minimum step time.

    pip install -e '.[tpu]'
    python experiments/benchmarks/step_plans.py

Each row runs `gemma2 plan` for an experiment of this repository in a new process, with the real TPU compiler but
without the chips. Sequences have 8192 tokens, one per data shard; parameters and moments are float32, compute is
bfloat16. The MaxText column has published figures for the same shapes and chips (MaxText 0.2.5, FSDP over all chips,
full remat, scanned layers, splash attention; "tuned" with its vocabulary tiled by 8); this script does not run MaxText.
All rows take about 25 minutes on two otherwise idle cores.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from gemma2_jax.machine import cores


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        limit: upper bound that was set for the peak, in bytes per chip; None where the step only has to fit.
        maxtext: MaxText's published figure for the same step, as text.
    """

    experiment: str
    topology: str
    limit: float | None
    maxtext: str


ROWS = (
    Row("pretrain_2b", "v5e:4x4", 5.0e9, "12.5 GB; vocabulary tiled 6.9 (arguments 2.0, temporaries 4.9)"),
    Row("pretrain_9b", "v5e:4x4", 12.5e9, "15.3 GB tuned, else out of memory"),
    Row("pretrain_27b", "v5e:8x8", None, "arguments 5.1, temporaries 14.4 GB tuned, else out of memory"),
    Row("distill_2b_from_9b", "v5e:4x4", 8.0e9, "-"),
    Row("distill_9b_from_27b", "v5p:2x2x4", 17e9, "-"),
    Row("report_2b", "v5e:16x16*2", None, "-"),
    Row("report_9b", "v4:8x16x32", None, "-"),
    Row("report_27b", "v5p:8x24x32", None, "-"),
)


def plan(experiment: str, topology: str, overrides: list[str]) -> dict[str, Any]:
    """Returns the output of `gemma2 plan --json`, run in a new process."""
    command = [sys.executable, "-m", "gemma2_jax.cli.main", "plan", f"experiment={experiment}"]
    command += [f"topology={topology}", "--json", *overrides]
    completed = subprocess.run(command, capture_output=True, text=True)
    if not completed.stdout:
        raise SystemExit(completed.stderr.strip())
    found: dict[str, Any] = json.loads(completed.stdout)
    return found


def cells(row: Row, topology: str, found: dict[str, Any]) -> list[str]:
    """Returns the cells of one table row."""
    memory, estimate = found["memory_per_device"], found.get("estimate")
    minimum = f"{estimate['step_seconds_at_least']:.2f}, {estimate['bound_by']}" if estimate else "-"
    return [
        row.experiment,
        topology,
        str(found["devices"]),
        "yes" if found["fits"] else "no",
        f"{memory['peak_bytes'] / 1e9:.2f}",
        "-" if row.limit is None else f"{row.limit / 1e9:.1f}",
        f"{memory['capacity_bytes'] / 1e9:.1f}",
        row.maxtext,
        f"{found['compile_seconds']:.0f}",
        minimum,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.experiment for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="rows to run (all)")
    parser.add_argument("--topology", help="one topology for all rows, instead of their own")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="overrides for every configuration"
    )
    options = parser.parse_args()

    print(f"{cores()} cores; GB are 10^9 bytes, per chip")
    header = ["run", "topology", "chips", "fits", "peak GB", "limit GB", "capacity GB", "MaxText"]
    print(f"| {' | '.join([*header, 'compile s', 'minimum step s (estimate)'])} |")
    print("|" + " --- |" * (len(header) + 2), flush=True)
    for row in ROWS:
        if row.experiment in options.only:
            topology = options.topology or row.topology
            found = plan(row.experiment, topology, options.set)
            print(f"| {' | '.join(cells(row, topology, found))} |", flush=True)


if __name__ == "__main__":
    main()
