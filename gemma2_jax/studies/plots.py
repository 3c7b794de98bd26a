"""Loss curves as a picture."""

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gemma2_jax.files import write_bytes
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


def _write(figure: Figure, target: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(target, buffer.getvalue())


def _curve(run_folder: str, split: str) -> tuple[list[int], list[float]]:
    """Steps and cross-entropy of a split."""
    rows = [row for row in read_metrics(run_folder) if row["split"] == split]
    return [row["step"] for row in rows], [row["cross_entropy"] for row in rows]
