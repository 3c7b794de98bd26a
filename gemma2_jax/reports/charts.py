"""The charts of a report: curves of the runs, and the shares of the students."""

from collections.abc import Mapping, Sequence

from gemma2_jax.reports.groups import RunGroup
from gemma2_jax.reports.intervals import SeedInterval
from gemma2_jax.reports.loss_chart import LossChart
from gemma2_jax.reports.markup import Markup, element
from gemma2_jax.reports.report_tables import percent, range_text
from gemma2_jax.reports.scales import spanning

_METRICS = (
    ("cross_entropy", "cross-entropy (nats per token)"),
    ("kl", "KL from the teacher (nats per token)"),
)
_OWN_LOSS = ("loss", "loss")


def loss_charts(groups: Sequence[RunGroup], styles: Mapping[str, str]) -> list[LossChart]:
    """Returns a chart for each metric that has curves: cross-entropy and KL, or else the runs' own loss."""
    charts = [LossChart(metric, title, metric, groups, styles) for metric, title in (*_METRICS, _OWN_LOSS)]
    *common, own = charts
    return [chart for chart in common if chart.curves] or ([own] if own.curves else [])


def share_chart(rows: Sequence[tuple[str, SeedInterval]], low_name: str, high_name: str) -> Markup:
    """Returns a chart with a row for each student, highest first: a dot for its mean share, and its interval.

    Args:
        low_name: what a share of 0 is.
        high_name: what a share of 100 % is.
    """
    scale = spanning([0.0, 1.0, *(end for _, found in rows for end in _ends(found))], 0.06)
    zero, one = (_percent(scale.place(value)) for value in (0.0, 1.0))
    head = element(
        "svg",
        element("text", f"{low_name}: 0 %", x=zero, y="14", class_="x"),
        element("text", f"{high_name}: 100 %", x=one, y="14", class_="x"),
        class_="track",
    )
    lines = [element("span"), head, element("span")]
    for name, found in sorted(rows, key=lambda row: -row[1].mean):
        low, high = (_percent(scale.place(end)) for end in _ends(found))
        marks = [element("line", x1=place, x2=place, y1="0", y2="22", class_="grid") for place in (zero, one)]
        middle = _percent(scale.place(found.mean))
        marks.append(element("line", x1="0", x2="100%", y1="11", y2="11", class_="grid"))
        marks.append(element("line", x1=zero, x2=middle, y1="11", y2="11", class_="gain c0"))
        marks.append(element("line", x1=low, x2=high, y1="11", y2="11", class_="range c0"))
        marks.append(element("circle", cx=middle, cy="11", r="5.5", class_="dot c0"))
        shown = (
            f"{percent(found.mean)} ({found.kind}: {range_text(found, 1, 100.0)} %)"
            if found.kind
            else percent(found.mean)
        )
        svg = element(
            "svg", element("title", f"{name}: {shown}"), *marks, class_="track", role="img",
            xmlns="http://www.w3.org/2000/svg",
        )  # fmt: skip
        lines += [element("span", name), svg, element("b", percent(found.mean))]
    return element("div", *lines, class_="shares")


def _ends(found: SeedInterval) -> tuple[float, float]:
    if found.low is None or found.high is None:
        return found.mean, found.mean
    return found.low, found.high


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"
