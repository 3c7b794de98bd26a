"""Evaluates a model with other windows than it was trained with, and draws perplexity over the window.

    gemma2 run local_global_ratio
    python experiments/window_at_inference/windows.py

Each window is that of `gemma2 eval RUN model.sliding_window=N`. Writes the records of the evaluations, WINDOW.json, and
windows.png to --output, and prints a table: the mean perplexity over seeds with the lowest and the highest, and the
same of the ratio to the perplexity with the trained window, seed by seed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gemma2_jax as g2
from gemma2_jax.config import UserError
from gemma2_jax.studies.plots import write_figure

TRAINED = 64
WINDOWS = (None, 128, TRAINED, 32, 16, 8)  # None: the whole row of 512 tokens
RUN = "local_1_global_1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs/local_global_ratio"), help="folder of the study")
    add("--output", type=Path, default=Path("runs/window_at_inference"), help="folder of the results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {window: perplexities(arguments.runs, window, arguments.output) for window in WINDOWS}
    print("| window at inference | perplexity | relative to the trained window |")
    print("| ---: | ---: | ---: |")
    for window, seeds in found.items():
        cells = [str(window or "none"), spread(seeds, ".2f"), spread(relative(seeds, found[TRAINED]), ".4f")]
        print(f"| {' | '.join(cells)} |")
    draw(found, arguments.output / "windows.png")


def perplexities(study: Path, window: int | None, output: Path) -> list[float]:
    """Returns the perplexity of each seed's run on its validation split. Raises UserError if there are no runs."""
    runs = sorted(study.glob(f"{RUN}-*"))
    if not runs:
        raise UserError(
            f"{study} holds no runs {RUN}-SEED; train them first: `gemma2 run local_global_ratio`."
        )
    record = g2.evaluate(runs, g2.EvaluationConfig(sliding_window=window))
    record.save(output / f"{window or 'none'}.json")
    return [row.scores["packed"].total.perplexity for row in record.rows]


def relative(seeds: Sequence[float], trained: Sequence[float]) -> list[float]:
    """Returns the ratio to the perplexity with the trained window for each seed."""
    return [one / other for one, other in zip(seeds, trained, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    """Returns the mean of the values, with the lowest and the highest."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(found: Mapping[int | None, Sequence[float]], target: Path) -> None:
    """Draws the ratio to the perplexity with the trained window, each seed and the mean, and writes a PNG."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    windows = list(reversed(WINDOWS))
    ratios = [relative(found[window], found[TRAINED]) for window in windows]
    axes.plot(range(len(windows)), [mean(each) for each in ratios], color="C0", marker="o")
    for place, each in enumerate(ratios):
        axes.plot([place] * len(each), each, "x", color="C0", alpha=0.6)
    axes.axvline(windows.index(TRAINED), color="0.4", linestyle="--", linewidth=1, label="trained window")
    axes.set_xticks(range(len(windows)), [str(window or "none") for window in windows])
    axes.set_xlabel("window of the local layers at inference (tokens)")
    axes.set_ylabel("perplexity, relative to the trained window")
    axes.set_title("crosses: the seeds; dots: their mean", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(figure, target)


if __name__ == "__main__":
    try:
        main()
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"windows.py: {error}")
