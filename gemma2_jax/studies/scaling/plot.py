"""The plot of a fit: losses over tokens, a line for each size, a panel for each source."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gemma2_jax.studies.plots import write_figure
from gemma2_jax.studies.scaling.fit import CONFIDENCE, Curve, interval
from gemma2_jax.studies.scaling.fitted import SCRATCH, Fit, Source

_MOST_TICKS = 6
_CLOSE = 1.35  # ratio of two ticks


def plot_fit(fit: Fit, target: Path) -> None:
    """Plots every run as a dot and the law as lines with intervals, and writes a PNG to `target`."""
    shown = [source for source in fit.sources.values() if source.runs]
    figure = Figure(figsize=(4.5 * len(shown) + 0.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, source in zip(panels, shown, strict=True):
        _draw(axes, fit, source)
    panels[0].set_ylabel("validation cross-entropy (nats per token)")
    _write_title(figure, fit)
    write_figure(figure, target)


def _draw(axes: Axes, fit: Fit, source: Source) -> None:
    sizes = sorted({run.parameters for run in source.runs})
    tokens = [run.tokens for run in source.runs]
    line = np.geomspace(min(tokens) * 0.8, max(tokens) * 1.25, 60)
    for number, size in enumerate(sizes):
        color = f"C{number % 10}"
        runs = [run for run in source.runs if run.parameters == size]
        axes.plot([run.tokens for run in runs], [run.loss for run in runs], "o", color=color, markersize=4)
        n = np.full_like(line, size)
        axes.plot(line, fit.curves[source.name].loss(n, line), color=color, linewidth=1.4, label=f"{size:,}")
        if fit.resampled:
            curves: list[Curve] = [each[source.name] for each in fit.resampled]
            losses = np.stack([curve.loss(n, line) for curve in curves])
            low, high = np.array([interval(column) for column in losses.T]).T
            axes.fill_between(line, low, high, color=color, alpha=0.15, linewidth=0)
    name = source.name if source.name == SCRATCH else f"teacher {Path(source.name).name}"
    if source.teacher is not None:
        axes.axhline(source.teacher.loss, color="0.4", linestyle="--", linewidth=1, label="the teacher")
    axes.set_title(name, fontsize=10)
    axes.set_xscale("log")
    axes.minorticks_off()
    places = _apart(sorted(set(tokens)))
    if len(places) <= _MOST_TICKS:  # powers of ten are too few for runs of similar length
        axes.set_xticks(places)
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="parameters", title_fontsize=8)


def _apart(places: Sequence[int]) -> list[int]:
    """Leaves out places so close to the one before that their labels would overlap."""
    found: list[int] = []
    for place in places:
        if not found or place >= _CLOSE * found[-1]:
            found.append(place)
    return found


def _write_title(figure: Figure, fit: Fit) -> None:
    bands = f"; bands: {CONFIDENCE:.0%} intervals of {len(fit.resampled)} sets of resampled runs"
    figure.suptitle(f"dots: runs; lines: the law{bands if fit.resampled else ''}", fontsize=9)
