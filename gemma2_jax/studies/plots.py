"""Loss curves, and what became of them, as pictures."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gemma2_jax.files import write_bytes
from gemma2_jax.studies.summary import Group
from gemma2_jax.training.metrics import read_metrics


def plot_losses(runs: Mapping[str, str], target: Path) -> None:
    """Draws the cross-entropy of each run against its steps, and writes a PNG to `target`.

    Lines with dots are the validation split, faint lines the training batches. Runs whose objective is another
    are comparable all the same, since every run logs its cross-entropy.

    Args:
        runs: the run folders by the names that the legend shows.
    """
    # Without pyplot there is no global state and no display to look for.
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    high = low = 0.0
    for position, (name, folder) in enumerate(runs.items()):
        color = f"C{position}"
        validation, training = _curve(folder, "validation"), _curve(folder, "train")
        axes.plot(*training, color=color, alpha=0.35, linewidth=0.8)
        label = f"{name} ({validation[1][-1]:.3f})"
        axes.plot(*validation, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
        high = max(high, *validation[1])
        low = min(low or high, *validation[1], *training[1])
    # The first steps fall from ln V; drawn in full they would flatten what there is to compare.
    margin = 0.05 * (high - low) + 0.01
    axes.set_ylim(low - margin, high + 4 * margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(
        "dots: validation, with its last value in brackets; faint: training batches", fontsize=9, loc="left"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _write(figure, target)


def plot_summary(groups: Sequence[Group], target: Path) -> None:
    """Draws the validation perplexity of a study's runs, every seed and their mean, and writes a PNG to `target`.

    Runs of a series are points of one line over their number of parameters; without series, each run has a row.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = dict.fromkeys(group.series for group in groups if group.series is not None)
    if series:
        for number, name in enumerate(series):
            points = [group for group in groups if group.series == name]
            sizes = [group.evaluations[0].parameters for group in points]
            means = [_mean(group) for group in points]
            axes.plot(sizes, means, color=f"C{number}", marker="o", label=name)
            for size, group in zip(sizes, points, strict=True):
                seeds = [found.perplexity for found in group.evaluations]
                axes.plot([size] * len(seeds), seeds, "x", color=f"C{number}", alpha=0.6)
        for number, group in enumerate(group for group in groups if group.series is None):
            axes.axhline(
                _mean(group),
                color="0.4",
                linestyle=["--", ":", "-."][number % 3],
                linewidth=1,
                label=group.name,
            )
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel("validation perplexity")
        axes.legend(frameon=False)
    else:
        for row, group in enumerate(groups):
            seeds = [found.perplexity for found in group.evaluations]
            axes.plot(seeds, [row] * len(seeds), "x", color=f"C{row}", alpha=0.6)
            axes.plot(_mean(group), row, "o", color=f"C{row}")
            axes.annotate(
                f"{_mean(group):.2f}", (_mean(group), row), (0, 7), textcoords="offset points", fontsize=8
            )
        axes.set_yticks(range(len(groups)), [group.name for group in groups])
        axes.invert_yaxis()
        axes.set_xlabel("validation perplexity")
    axes.set_title("crosses: the seeds; dots: their mean", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, target)


def _mean(group: Group) -> float:
    return statistics.mean(found.perplexity for found in group.evaluations)


def _write(figure: Figure, target: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(target, buffer.getvalue())


def _curve(run_folder: str, split: str) -> tuple[list[int], list[float]]:
    """Steps and cross-entropy of a split, but for training rows of on-policy steps alone, which have none."""
    rows = [row for row in read_metrics(run_folder) if row["split"] == split and "cross_entropy" in row]
    return [row["step"] for row in rows], [row["cross_entropy"] for row in rows]
