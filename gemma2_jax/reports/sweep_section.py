"""The part of a page about a sweep: importance of its keys, results over two keys, and over each key by itself."""

from collections.abc import Mapping, Sequence
from statistics import median

from gemma2_jax.reports.groups import SEEDS, RunGroup
from gemma2_jax.reports.markup import Markup, element, together
from gemma2_jax.reports.reported_runs import Run
from gemma2_jax.reports.scales import Scale, spanning
from gemma2_jax.reports.svg import Axis, axis, dots, line, plot, point
from gemma2_jax.reports.sweeps import Grid, heat_grid, importance, numeric_value, ordered, swept_keys
from gemma2_jax.training.metrics import format_number

IMPORTANCE_SENTENCE = (
    "Share of the variance of the results that the values of a key explain by themselves: epsilon squared on the ranks "
    "of the cross-entropies, unfinished runs below finished ones. A key with many numbers is divided into quarters of "
    "the runs. What keys explain only together is in none of the shares."
)
_MOST_KEYS = 8
_WIDE = 8.0  # ratio of the largest to the smallest number from which a scale is logarithmic


def sweep_section(
    runs: Sequence[Run], groups: Sequence[RunGroup], styles: Mapping[str, str]
) -> Markup | None:
    """Returns the part of the page; None if the runs are of no sweep or have no results."""
    scored = [run for run in runs if run.cross_entropy is not None]
    keys = [key for key in swept_keys(scored) if key not in SEEDS]
    if not keys or not all(run.values for run in scored):
        return None
    parts: list[Markup] = []
    if not all(run.is_finished for run in scored):
        parts.append(element("p", "Runs that have not finished count with their last validation."))
    if shares := importance(scored):
        parts += [
            element("h3", "Importance of the keys"),
            _bars(shares),
            element("p", IMPORTANCE_SENTENCE, class_="quiet"),
        ]
    if (found := heat_grid(scored)) is not None:
        parts += [
            element("h3", f"Cross-entropy over {found.rows[0]} and {found.columns[0]}"),
            _heat_map(found),
            element("p", "Means over the runs of each pair of values; framed: the lowest.", class_="quiet"),
        ]
    plots = [_key_plot(key, scored, styles) for key in keys[:_MOST_KEYS]]
    parts += [
        element("h3", "Cross-entropy over each key"),
        element("div", *plots, class_="tiles"),
        element("p", "Dots: runs; line: medians over the runs of each value.", class_="quiet"),
    ]
    return together(*parts)


def _bars(shares: Mapping[str, float]) -> Markup:
    lines = []
    for key, share in shares.items():
        bar = element("span", style=f"width:{100 * share:.1f}%", title=f"{share:.3f}")
        cells = [
            element("th", key, scope="row"),
            element("td", f"{100 * share:.0f} %"),
            element("td", bar, class_="bar"),
        ]
        lines.append(element("tr", *cells))
    return element("table", element("tbody", *lines), class_="bars")


def _heat_map(found: Grid) -> Markup:
    """A table of cells, whose colour is stronger where the cross-entropy is lower."""
    low, high = min(found.cells.values()), max(found.cells.values())
    columns = [element("th", value, scope="col") for value in found.columns[1]]
    corner = element("th", f"{found.rows[0]} ↓  {found.columns[0]} →", scope="col", class_="text")
    lines = []
    for row in found.rows[1]:
        cells = [element("th", row, scope="row")]
        for column in found.columns[1]:
            loss = found.cells.get((row, column))
            if loss is None:
                cells.append(element("td", "–", class_="none"))
                continue
            share = 1.0 if high == low else 1 - _rank(loss, list(found.cells.values()))
            style = " ".join(
                name for name, holds in (("strong", share > 0.6), ("best", loss == low)) if holds
            )
            cells.append(
                element(
                    "td", format_number(loss, 4), class_=style or None, style=f"--share:{5 + 85 * share:.0f}%"
                )
            )
        lines.append(element("tr", *cells))
    table = element(
        "table", element("thead", element("tr", corner, *columns)), element("tbody", *lines), class_="heat"
    )
    return element("div", table, class_="scroll")


def _rank(loss: float, losses: Sequence[float]) -> float:
    """Returns the place of a loss among all, from 0 to 1, so that a diverged run does not take all colours."""
    distinct = sorted(set(losses))
    return distinct.index(loss) / max(len(distinct) - 1, 1)


def _key_plot(key: str, runs: Sequence[Run], styles: Mapping[str, str]) -> Markup:
    values = ordered({run.values.get(key, "") for run in runs})
    x, place = _across(key, values)
    losses = sorted(run.cross_entropy or 0.0 for run in runs)
    best = losses[0]
    held = [loss for loss in losses if loss <= max(1.5 * best, best + 1)] or losses
    y = axis("cross-entropy (nats per token)", spanning(held, 0.08), 4)
    medians, marks = [], []
    for value in values:
        own = [run for run in runs if run.values.get(key, "") == value]
        medians.append(point(x, y, place[value], median(run.cross_entropy or 0.0 for run in own)))
        for run in own:
            spot = dots([point(x, y, place[value], run.cross_entropy or 0.0)])
            title = element("title", f"{run.name}: {format_number(run.cross_entropy, 4)}")
            marks.append(element("g", title, spot, class_="series validation c0 faint"))
    middle = element("g", line(medians), class_="series validation c0")
    inner = plot(f"cross-entropy over {key}", x, y, together(middle, *marks))
    return element("div", inner, class_="frame bare small")


def _across(key: str, values: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """Returns the axis of a key, and the position of each value: of numbers to scale, of others in order."""
    numbers = {value: numeric_value(value) for value in values}
    known = [each for each in numbers.values() if each is not None]
    if len(known) < len(values):
        place = {value: float(number) for number, value in enumerate(values)}
        return Axis(key, Scale(-0.5, len(values) - 0.5), [(place[value], value) for value in values]), place
    log = min(known) > 0 and max(known) >= _WIDE * min(known)
    scale = spanning(known, 0.06, log)
    shown = Axis(key, scale, [(each, f"{each:g}") for each in known]) if len(known) <= 6 else axis(key, scale)
    return shown, {value: each for value, each in numbers.items() if each is not None}
