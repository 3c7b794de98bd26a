"""Compares successive halving with the whole grid: does it find the best point, and with how many of the tokens?

    python experiments/benchmarks/asha_vs_grid.py --output runs/benchmarks/asha_vs_grid

Trains the `toy` model on the documentation of Python at every point of a grid of --rates learning rates and four
values of AdamW's beta2 for --steps steps; then the same points with rungs at a ninth, two ninths and two thirds of the
steps, at each of which the better half goes on; both for --seeds seeds. All are sweeps, so the same command resumes an
interrupted comparison. The table gives the best point of each, its final validation cross-entropy, and the tokens of
all its runs.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from gemma2_jax.cli.compose import compose
from gemma2_jax.studies.space import SweepConfig, axes, grid
from gemma2_jax.studies.sweep import run_sweep
from gemma2_jax.studies.sweep_cost import sweep_cost
from gemma2_jax.studies.trials import Combination, Sweep

LOWEST, HIGHEST = 1e-4, 0.3  # learning rates
BETAS = (0.9, 0.95, 0.99, 0.999)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder of the two sweeps")
    parser.add_argument("--rates", type=int, default=8, help="number of learning rates (8)")
    parser.add_argument("--steps", type=int, default=81, help="steps of a whole run, a multiple of 9 (81)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of all runs")
    options = parser.parse_args()
    ratio = (HIGHEST / LOWEST) ** (1 / max(1, options.rates - 1))
    rates = tuple(float(f"{LOWEST * ratio**number:.3g}") for number in range(options.rates))
    rungs = tuple(ninths * (options.steps // 9) for ninths in (1, 2, 6))
    shared = [
        *("model=toy", f"training.steps={options.steps}", f"training.eval_every={rungs[0]}"),
        *(f"training.log_every={rungs[0]}", f"checkpoint.every={rungs[0]}", "optimizer.warmup_steps=0.1"),
        *("metrics.tensorboard=false", *options.overrides),
    ]
    print(
        f"{'':18}{'learning rate, beta2':>24}{'cross-entropy':>16}{'tokens':>14}{'of the grid':>14}",
        flush=True,
    )
    for seed in range(options.seeds):
        whole = 0
        for name, chosen in (("grid", ()), ("with rungs", rungs)):
            output = f"{options.output}/seed_{seed}/{name.replace(' ', '_')}"
            sweep = sweep_of(output, rates, chosen, [*shared, f"seed={seed}", f"data.seed={seed}"])
            if not run_sweep(sweep, Console(quiet=True)):
                raise SystemExit(f"a run failed; see {sweep.output}/table.md")
            best = json.loads(Path(sweep.output, "results.json").read_text())[0]
            tokens = sweep_cost(sweep).tokens
            whole = whole or tokens
            point, loss = ", ".join(best["values"].values()), best["cross_entropy"]
            label = f"seed {seed}, {name}"
            print(f"{label:18}{point:>24}{loss:>16.4f}{tokens:>14,}{tokens / whole:>14.1%}", flush=True)


def sweep_of(output: str, rates: tuple[float, ...], rungs: tuple[int, ...], shared: list[str]) -> Sweep:
    settings = SweepConfig(
        "grid", space={"optimizer.learning_rate": rates, "optimizer.beta2": BETAS}, rungs=rungs, reduction=2
    )
    trials = []
    for number, point in enumerate(grid(axes(settings))):
        own = [f"{key}={value}" for key, value in point.items()]
        place = {"name": f"{number:02}", "output": f"{output}/{number:02}"}
        trials.append([Combination(point, compose([*shared, *own], values=place))])
    return Sweep(settings, output, trials, lambda number, point: trials[number])


if __name__ == "__main__":
    main()
