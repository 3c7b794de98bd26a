"""Makes a record from the fields of a line of JSONL or of a row of Parquet.

A record is the text of a document, or an `Invalid` that explains why it cannot be read.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from gemma2_jax.data.globs import FORMATS
from gemma2_jax.data.invalid import Invalid

Record = str | Invalid


class Fields(Protocol):
    """Defines which fields of a source make a record."""

    @property
    def identity(self) -> str:
        """A string that determines the records that it makes of the same fields."""

    @property
    def column(self) -> str | None:
        """The only column of Parquet files that is read; None reads all columns."""

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of files that are read; text files have no fields."""

    def missing(self, names: Collection[str], place: str) -> Invalid | None:
        """Returns why fields with these names make no record; None if they may make one."""

    def record(self, fields: Mapping[str, Any], names: Collection[str], place: str) -> Record:
        """Returns the record of some fields.

        Args:
            fields: values by name.
            names: names of all fields there, including those that were not read.
            place: file with the line or row, for error messages.
        """


class TextField:
    """A record is the text of one field.

    Args:
        name: `data.text_field`.
    """

    formats = FORMATS

    def __init__(self, name: str) -> None:
        self.identity = self.column = self._name = name

    def missing(self, names: Collection[str], place: str) -> Invalid | None:
        return None if self._name in names else self._no_text(names, place)

    def record(self, fields: Mapping[str, Any], names: Collection[str], place: str) -> Record:
        value = fields.get(self._name)
        if value is None:
            return self._no_text(names, place)
        if not isinstance(value, str):
            kind = type(value).__name__
            return Invalid(place, f"the field {self._name!r} holds {kind}", "it must hold text")
        return without_surrogates(value, place)

    def _no_text(self, names: Collection[str], place: str) -> Invalid:
        listed = ", ".join(names) or "none"
        hint = f"set data.text_field to the field that holds the text (fields there: {listed})"
        return Invalid(place, f"no text in the field {self._name!r}", hint)


def without_surrogates(text: str, place: str) -> Record:
    """Returns the text if UTF-8 can encode it, else an invalid record."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Invalid(place, "the text contains a lone surrogate", "UTF-8 cannot encode it")
    return text
