"""Colours of groups in charts, by CSS class: seven that colour-blind readers can tell apart, then dashes, then grey."""

from collections.abc import Sequence

from gemma2_jax.reports.groups import RunGroup

COLOURS = 7
_DASHES = 2
REST = "rest"  # class of the groups beyond those


def colours(groups: Sequence[RunGroup]) -> dict[str, str]:
    """Returns the classes of each run by its name. If the groups outnumber the colours, the best are coloured.

    The many runs of a sweep have no dashes: all but the best are grey.
    """
    shown = COLOURS if any(group.runs[0].values for group in groups) else COLOURS * _DASHES
    ranked = list(groups)
    if len(groups) > shown:
        ranked.sort(key=lambda group: min(group.losses, default=float("inf")))
    place = {id(group): number for number, group in enumerate(ranked)}
    return {run.name: _style(place[id(group)], shown) for group in groups for run in group.runs}


def _style(place: int, shown: int) -> str:
    if place >= shown:
        return REST
    return f"c{place % COLOURS}" + (f" d{place // COLOURS}" if place >= COLOURS else "")
