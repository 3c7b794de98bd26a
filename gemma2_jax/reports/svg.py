"""SVG plots that fill the width of the page: text has its own size, and only the marks are stretched."""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma2_jax.reports.markup import Markup, element
from gemma2_jax.reports.scales import Scale, tick_labels, ticks, time_unit

SIZE = 1000  # width and height of the marks' coordinates
_APART = 0.055  # least distance of labels beside the plot, as a fraction of its height
_LONGEST_LABEL = 22  # characters


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        title: what it shows, with its unit.
        scale: its scale.
        marks: position and label of each tick.
    """

    title: str
    scale: Scale
    marks: Sequence[tuple[float, str]]


def axis(title: str, scale: Scale, count: int = 6) -> Axis:
    """Returns an axis with round ticks."""
    values = ticks(scale, count)
    return Axis(title, scale, list(zip(values, tick_labels(values), strict=True)))


def time_axis(title: str, scale: Scale) -> Axis:
    """Returns an axis over seconds, in the unit that suits them."""
    size, name = time_unit(scale.high)
    inner = axis(f"{title} ({name})", Scale(scale.low / size, scale.high / size, scale.log))
    return Axis(inner.title, scale, [(value * size, label) for value, label in inner.marks])


def plot(
    title: str,
    x: Axis,
    y: Axis,
    marks: Markup,
    labels: Sequence[tuple[float, str, str]] = (),
) -> Markup:
    """Returns a plot as an SVG.

    Args:
        title: description for readers who do not see it.
        marks: SVG in coordinates from `point`.
        labels: value on the vertical axis, text and class of labels to the right of the plot.
    """
    parts = [element("title", title)]
    for value, text in y.marks:
        place = _percent(1 - y.scale.place(value))
        parts.append(element("line", class_="grid", x1="0", x2="100%", y1=place, y2=place))
        parts.append(element("text", text, class_="tick y", x="0", y=place, dx="-8", dy="0.32em"))
    for number, (value, text) in enumerate(x.marks):
        place = _percent(x.scale.place(value))
        minor = " minor" if number % 2 else ""  # left out on narrow screens
        parts.append(element("line", class_="grid", x1=place, x2=place, y1="0", y2="100%"))
        parts.append(element("text", text, class_=f"tick x{minor}", x=place, y="100%", dy="1.4em"))
    parts.append(element("line", class_="base", x1="0", x2="100%", y1="100%", y2="100%"))
    parts.append(element("text", y.title, class_="name", x="0", y="0", dx="-8", dy="-0.9em"))
    parts.append(element("text", x.title, class_="name x", x="100%", y="100%", dy="2.9em"))
    parts.append(
        element(
            "svg",
            marks,
            class_="marks",
            width="100%",
            height="100%",
            viewBox=f"0 0 {SIZE} {SIZE}",
            preserveAspectRatio="none",
        )
    )
    parts.append(element("line", class_="cursor", x1="0", x2="0", y1="0", y2="100%", visibility="hidden"))
    for up, text, style in _apart([(y.scale.place(value), text, style) for value, text, style in labels]):
        shown = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
        parts.append(
            element("text", shown, class_=f"label {style}", x="100%", y=_percent(1 - up), dx="8", dy="0.32em")
        )
    return element("svg", *parts, class_="plot", role="img", xmlns="http://www.w3.org/2000/svg")


def point(x: Axis, y: Axis, across: float, up: float) -> tuple[float, float]:
    """Returns the coordinates of a point with these values."""
    return round(SIZE * x.scale.place(across), 1), round(SIZE * (1 - y.scale.place(up)), 1)


def line(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """Returns a line through points, with a width that does not stretch with the plot."""
    written = " ".join(f"{across:g},{up:g}" for across, up in points)
    return element("polyline", points=written, vector_effect="non-scaling-stroke", **attributes)


def dots(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """Returns a round dot at each point, with a size that does not stretch with the plot."""
    written = "".join(f"M{across:g} {up:g}h0" for across, up in points)
    return element("path", d=written, vector_effect="non-scaling-stroke", **attributes)


def _apart(labels: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Moves labels up as far as is needed to keep them from overlapping, and all of them down if they leave the top."""
    placed: list[tuple[float, str, str]] = []
    for place, text, style in sorted(labels):
        low = placed[-1][0] + _APART if placed else 0.0
        placed.append((max(min(place, 1.0), low), text, style))
    top = 1.0
    for number in range(len(placed) - 1, -1, -1):
        place, text, style = placed[number]
        placed[number] = (min(place, top), text, style)
        top = placed[number][0] - _APART
    return placed


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"
