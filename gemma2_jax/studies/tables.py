"""Plain lines on a terminal, and tables that can be printed and written as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box, table
from rich.console import Console
from rich.text import Text


def say(console: Console, line: str, style: str = "") -> None:
    """Prints a line as it is: brackets are no markup, numbers have no colours, the terminal breaks it."""
    console.print(Text(line, style), soft_wrap=True)


@dataclass(frozen=True)
class Table:
    """Column names, and rows of as many cells; the first `left` columns hold text, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def print(self, console: Console, title: str) -> None:
        """Prints the title, and the table with numbers on the right."""
        say(console, title, "bold")  # a title of rich's own would be broken to the table's width
        grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for position, column in enumerate(self.columns):
            words = column.replace(
                " ", "\n"
            )  # below one another, so that a table of seven fits into 80 columns
            grid.add_column(Text(words), justify="left" if position < self.left else "right")
        for row in self.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)

    def markdown(self) -> str:
        """Returns the table as Markdown, without a line break at the end."""
        rule = ["---" if position < self.left else "---:" for position in range(len(self.columns))]
        lines = [self.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
