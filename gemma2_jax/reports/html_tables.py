"""Tables of a report as HTML, which the page's script sorts and filters."""

from collections.abc import Sequence

from gemma2_jax.reports.markup import Markup, element
from gemma2_jax.reports.report_tables import Cell, Column


def html_table(
    columns: Sequence[Column], identity: str, runs: Sequence[str] | None = None, wrap: bool = False
) -> Markup:
    """Returns a table whose first column names its rows.

    Args:
        identity: its name, unique in the page.
        runs: the name of each row's run, whose curves the filter hides together with the row.
        wrap: whether cells break their lines.
    """
    headings = [
        element(
            "th",
            element("button", _breakable(column.name), type="button"),
            scope="col",
            class_=_style(column),
        )
        for column in columns
    ]
    best = [column.best_rows() for column in columns]
    lines = []
    for row in range(len(columns[0].cells)):
        cells = [
            _cell(column, column.cells[row], place == 0, row in best[place])
            for place, column in enumerate(columns)
        ]
        lines.append(element("tr", *cells, data_run=None if runs is None else runs[row]))
    table = element(
        "table",
        element("thead", element("tr", *headings)),
        element("tbody", *lines),
        class_="sortable wrap" if wrap else "sortable",
        id=f"{identity}-table",
    )
    return element("div", table, class_="scroll")


def _cell(column: Column, cell: Cell, is_name: bool, is_best: bool) -> Markup:
    value = "" if cell.value is None else cell.value
    if is_name:
        return element("th", cell.text, scope="row", data_value=value, title=cell.text)
    style = " ".join(name for name in (_style(column), "best" if is_best else None) if name)
    return element("td", cell.text, class_=style or None, data_value=value)


def _style(column: Column) -> str | None:
    return "text" if column.is_text else None


def _breakable(key: str) -> str:
    """A dotted key that may break after its dots."""
    return key.replace(".", ".\u200b")
