"""The chart of a metric against steps, tokens, FLOPs and time, with its legend and controls."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from gemma2_jax.reports.colours import REST
from gemma2_jax.reports.curves import AXES, LossCurve, curves
from gemma2_jax.reports.groups import RunGroup
from gemma2_jax.reports.markup import Markup, element, together
from gemma2_jax.reports.scales import Scale, spanning
from gemma2_jax.reports.svg import Axis, axis, dots, line, plot, point, time_axis

_SPLITS = {"validation": "validation", "train": "training batches"}


class LossChart:
    """A metric of several runs.

    Args:
        identity: name of the chart, unique in the page.
        title: what the vertical axis shows.
        metric: name of the metric in the rows.
        groups: runs that differ in their seeds only; they share a colour.
        styles: CSS classes by the name of the run.

    Attributes:
        curves: the curves that are drawn.
    """

    def __init__(
        self, identity: str, title: str, metric: str, groups: Sequence[RunGroup], styles: Mapping[str, str]
    ) -> None:
        self.identity, self.title = identity, title
        self._styles = styles
        self.curves = [curve for group in groups for run in group.runs for curve in curves(run, metric)]
        drawn = {curve.run for curve in self.curves}
        self._groups = [group for group in groups if drawn & {run.name for run in group.runs}]

    def values(self) -> list[dict[str, object]]:
        """The values of each curve, which the page shows under the pointer."""
        return [
            {
                "run": curve.run,
                "split": curve.split,
                "y": [_rounded(value) for value in curve.y],
                **{name: [_rounded(value) for value in places] for name, places in curve.x.items()},
            }
            for curve in self.curves
        ]

    def figure(self) -> Markup:
        """The chart with controls, legend, and one plot for each axis and scale, of which the page shows one."""
        axes = [name for name in AXES if any(name in curve.x for curve in self.curves)]
        plots = [self._plot(name, log) for name in axes for log in (False, True)]
        return element(
            "figure",
            self._controls(axes),
            self._legend(),
            element("div", *plots, element("div", class_="tip", hidden=True), class_="plots"),
            element("figcaption", *self._caption(axes)),
            class_="chart",
            id=self.identity,
        )

    def _controls(self, axes: Sequence[str]) -> Markup:
        choices = [
            element("button", "time" if name == "seconds" else "FLOPs" if name == "flops" else name,
                    type="button", data_axis=name, aria_pressed=str(number == 0).lower())
            for number, name in enumerate(axes)
        ]  # fmt: skip
        switches = [element("button", "log scale", type="button", data_log=True, aria_pressed="false")]
        splits = {curve.split for curve in self.curves}
        if len(splits) > 1:
            switches += [
                element("button", label, type="button", data_split=split, aria_pressed="true")
                for split, label in _SPLITS.items()
            ]
        across = element("span", *choices, class_="choice", role="group", aria_label="horizontal axis")
        return element("div", across, element("span", *switches, class_="choice"), class_="controls")

    def _legend(self) -> Markup:
        entries = []
        for group in self._groups:
            style = self._styles[group.runs[0].name]
            if style != REST:
                seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
                entries.append(_legend_entry(style, f"{group.name}{seeds}", [run.name for run in group.runs]))
        rest = [run.name for group in self._groups for run in group.runs if self._styles[run.name] == REST]
        if rest:
            entries.append(_legend_entry(REST, f"{len(rest)} other runs", rest))
        return element("div", *entries, class_="legend")

    def _plot(self, name: str, log: bool) -> Markup:
        drawn = [curve for curve in self.curves if name in curve.x]
        scale = spanning([value for curve in drawn for value in curve.x[name]], 0.015, log)
        x = time_axis(AXES[name], scale) if name == "seconds" else axis(AXES[name], scale)
        y = axis(self.title, _vertical(drawn))
        lines = [self._line(curve, x, y, name, self.curves.index(curve)) for curve in drawn]
        ordered = sorted(zip(drawn, lines, strict=True), key=lambda pair: self._depth(pair[0]))
        labels = self._labels(drawn)
        shown = plot(
            f"{self.title} against {AXES[name]}", x, y, together(*(each for _, each in ordered)), labels
        )
        first = name == "steps" and not log
        return element(
            "div", shown, class_="frame", data_axis=name, data_log=str(log).lower(), hidden=not first
        )

    def _line(self, curve: LossCurve, x: Axis, y: Axis, name: str, number: int) -> Markup:
        points = [point(x, y, across, up) for across, up in zip(curve.x[name], curve.y, strict=True)]
        style = f"series {curve.split} {self._styles[curve.run]}"
        parts = [line(points)] if len(points) > 1 else []
        if curve.split == "validation" or len(points) == 1:
            parts.append(dots(points))
        return element(
            "g", *parts, class_=style, data_run=curve.run, data_split=curve.split, data_curve=number
        )

    def _depth(self, curve: LossCurve) -> tuple[bool, bool]:
        """Training below validation, and grey below colours."""
        return curve.split == "validation", self._styles[curve.run] != REST

    def _labels(self, drawn: Sequence[LossCurve]) -> list[tuple[float, str, str]]:
        """A label for each group, at the mean of its runs' last values."""
        labels = []
        for group in self._groups:
            names = {run.name for run in group.runs}
            own = [curve for curve in drawn if curve.run in names]
            ends = [curve.y[-1] for curve in own if curve.split == "validation"] or [
                curve.y[-1] for curve in own
            ]
            style = self._styles[group.runs[0].name]
            if ends and style != REST:
                labels.append((fmean(ends), group.label, style))
        return labels

    def _caption(self, axes: Sequence[str]) -> list[str]:
        sentences = []
        if any(curve.split == "validation" for curve in self.curves):
            sentences.append("Dots and strong lines: validation; faint lines: training batches.")
        averaged = max((curve.averaged for curve in self.curves), default=1)
        if averaged > 1:
            sentences.append(f" A point of a long training curve is the mean of up to {averaged} rows.")
        if "flops" in axes:
            sentences.append(
                " FLOPs are those of the model's matrix products, forward and backward, with an online teacher's "
                "forward pass and without the writing of a cache."
            )
        return sentences


def _legend_entry(style: str, text: str, runs: Sequence[str]) -> Markup:
    swatch = element("svg", element("line", x1="0", x2="20", y1="6", y2="6"), class_=f"swatch {style}",
                     width="20", height="12", aria_hidden="true")  # fmt: skip
    return element(
        "button",
        swatch,
        text,
        type="button",
        aria_pressed="true",
        data_runs="\n".join(runs),
        title="show or hide",
    )


def _vertical(drawn: Sequence[LossCurve]) -> Scale:
    """A scale that holds the validations of the runs that did not diverge, and the lower part of the training curves.

    Training curves begin at the loss of random guesses, which would flatten everything else.
    """
    validations = [curve.y for curve in drawn if curve.split == "validation"]
    best = min((min(values) for values in validations), default=None)
    if best is None:
        found = sorted(value for curve in drawn for value in curve.y)
        return spanning(found[: max(2, math.ceil(0.95 * len(found)))])
    held = [values for values in validations if values[-1] <= max(1.5 * best, best + 1)] or validations
    high = max(max(values) for values in held)
    training = [value for curve in drawn if curve.split == "train" for value in curve.y if value <= high]
    return spanning([high, best, *training])


def _rounded(value: float) -> float:
    """Six significant digits, which is more than the page shows."""
    return float(f"{value:.6g}")
