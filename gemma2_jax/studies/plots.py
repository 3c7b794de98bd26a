"""Plots of loss curves and of final results."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gemma2_jax.files import write_bytes
from gemma2_jax.studies.summary import Group
from gemma2_jax.training.metrics import format_number, read_metrics


def plot_losses(runs: Mapping[str, str], target: Path) -> None:
    """Plots the cross-entropy of each run against its steps, and writes a PNG to `target`.

    Lines with dots are the validation split, faint lines the training batches. Runs with different objectives are
    comparable, since every run logs its cross-entropy.

    Args:
        runs: run folders by their names in the legend.
    """
    # Using Figure without pyplot avoids global state and the search for a display.
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {name: (_curve(folder, "validation"), _curve(folder, "train")) for name, folder in runs.items()}
    # The limits leave out diverged runs, which would flatten the other curves.
    last = min(validation[1][-1] for validation, _ in curves.values())
    high = low = 0.0
    for position, (name, (validation, training)) in enumerate(curves.items()):
        color = f"C{position}"
        axes.plot(*training, color=color, alpha=0.35, linewidth=0.8)
        label = f"{name} ({validation[1][-1]:.3f})"
        axes.plot(*validation, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
        if validation[1][-1] < 2 * last:
            high = max(high, *validation[1])
        low = min(low or high, *validation[1], *training[1])
    # They leave out the first training steps too, in which the loss falls from ln V.
    margin = 0.05 * (high - low) + 0.01
    axes.set_ylim(low - margin, high + 4 * margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(
        "dots: validation, with its last value in brackets; faint: training batches", fontsize=9, loc="left"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")  # beside the curves, of which there may be many
    write_figure(figure, target)


def plot_summary(groups: Sequence[Group], target: Path, axis: str = "parameters") -> None:
    """Plots the validation perplexity of each group, each seed and their mean, and writes a PNG to `target`.

    Groups of a series are points of one line over their `x`; without series, each group has a row.

    Args:
        axis: label of `x`.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if any(group.series is not None for group in groups):
        _draw_lines(axes, groups)
        axes.set_xlabel(axis)
        axes.set_ylabel("validation perplexity")
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
    else:
        _draw_rows(axes, groups)
        axes.set_xlabel("validation perplexity")
    if any(len(group.evaluations) > 1 for group in groups):
        axes.set_title("crosses: the seeds; dots: their mean", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, target)


def _draw_lines(axes: Axes, groups: Sequence[Group]) -> None:
    """Draws a line for each series, and a horizontal line for each group without a series."""
    for number, name in enumerate(
        dict.fromkeys(group.series for group in groups if group.series is not None)
    ):
        points = sorted((group for group in groups if group.series == name), key=lambda group: group.x or 0.0)
        places = [group.x or 0.0 for group in points]
        axes.plot(places, [_mean(group) for group in points], color=f"C{number}", marker="o", label=name)
        for x, group in zip(places, points, strict=True):
            if len(group.evaluations) > 1:
                seeds = [found.perplexity for found in group.evaluations]
                axes.plot([x] * len(seeds), seeds, "x", color=f"C{number}", alpha=0.6)
    for number, group in enumerate(group for group in groups if group.series is None):
        axes.axhline(
            _mean(group), color="0.4", linestyle=["--", ":", "-."][number % 3], linewidth=1, label=group.name
        )
    axes.set_xscale(_scale([group.x for group in groups if group.x is not None]))
    axes.set_yscale(_scale([_mean(group) for group in groups], least=20))


def _draw_rows(axes: Axes, groups: Sequence[Group]) -> None:
    for row, group in enumerate(groups):
        seeds = [found.perplexity for found in group.evaluations]
        axes.plot(seeds, [row] * len(seeds), "x", color=f"C{row}", alpha=0.6)
        axes.plot(_mean(group), row, "o", color=f"C{row}")
        axes.annotate(
            format_number(_mean(group), 2),
            (_mean(group), row),
            (0, 7),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_yticks(range(len(groups)), [group.name for group in groups])
    axes.set_xscale(_scale([_mean(group) for group in groups], least=20))
    axes.invert_yaxis()


def _scale(values: Sequence[float], least: float = 4) -> Literal["log", "linear"]:
    """Returns "log" if all values are positive and the largest is at least `least` times the smallest."""
    finite = [value for value in values if math.isfinite(value)]
    return "log" if finite and min(finite) > 0 and max(finite) >= least * min(finite) else "linear"


def _mean(group: Group) -> float:
    return statistics.mean(found.perplexity for found in group.evaluations)


def write_figure(figure: Figure, target: Path) -> None:
    """Writes a figure to `target` as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(target, buffer.getvalue())


def _curve(run_folder: str, split: str) -> tuple[list[int], list[float]]:
    """Returns steps and cross-entropy of a split. Training rows of on-policy steps only have none and are left out."""
    rows = [row for row in read_metrics(run_folder) if row["split"] == split and "cross_entropy" in row]
    return [row["step"] for row in rows], [row["cross_entropy"] for row in rows]
