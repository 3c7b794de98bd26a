"""Plain lines on a terminal, and tables for the terminal and for Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box, table
from rich.console import Console
from rich.text import Text


def print_line(console: Console, line: str, style: str = "") -> None:
    """Prints a line verbatim: without markup or highlighted numbers, and wrapped by the terminal itself."""
    console.print(Text(line, style), soft_wrap=True)


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Attributes:
        columns: column names.
        rows: rows with one cell per column.
        left: number of columns, from the left, that hold text; the others hold numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def print(self, console: Console, title: str) -> None:
        """Prints the title and the table, with numbers aligned right."""
        print_line(console, title, "bold")  # rich would wrap a table's own title to the table's width
        grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for position, column in enumerate(self.columns):
            header = column.replace(
                " ", "\n"
            )  # one word per line, so that a table of seven columns fits into 80
            grid.add_column(Text(header), justify="left" if position < self.left else "right")
        for row in self.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)

    def markdown(self) -> str:
        """Returns the table as Markdown, without a line break at the end."""
        rule = ["---" if position < self.left else "---:" for position in range(len(self.columns))]
        lines = [self.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def code(text: str) -> str:
    """Formats any text as Markdown code on one line."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text.replace(chr(10), '⏎')} {fence}"
