"""HTML and SVG elements from Python, with all text escaped."""

import re
from html import escape

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no text of HTML or XML


class Markup(str):
    """Text that is HTML or SVG already, and so is not escaped again."""


def element(tag: str, *children: str | Markup | None, **attributes: object) -> Markup:
    """Returns an element. Every child that is not `Markup` is escaped, and so are the attributes' values.

    Args:
        children: contents; None is left out.
        attributes: `class_` stands for `class`, and other underscores for hyphens (`data_run` for `data-run`). None and
            False leave an attribute out, and True repeats its name, as XML requires a value.
    """
    written = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is not None and value is not False:
            written.append(f' {name}="{_escaped(name if value is True else str(value))}"')
    inside = together(*children)
    return Markup(f"<{tag}{''.join(written)}>{inside}</{tag}>")


def together(*children: str | Markup | None) -> Markup:
    """Returns the children one after another, escaped as in `element`."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(text: str | Markup) -> str:
    return text if isinstance(text, Markup) else escape(_CONTROLS.sub("\ufffd", text))
