"""Which documents are held out: decided by their content, and never all of them or none."""

import math
from collections.abc import Iterator

from gemma2_jax.config import UserError
from gemma2_jax.data.sources import Documents
from gemma2_jax.data.tokenise import chance

_PIECES = 10  # that a lone document is cut into


def divide(source: Documents, names: tuple[str, ...], fraction: float) -> tuple[Documents, float]:
    """The documents of `source`, and the number that the chance of those held out lies below.

    That is `fraction`, unless it would leave a split empty: then the one document with the lowest chance is held out,
    or the one with the highest is kept to train on. A source of one document is cut into pieces first. Reads only as
    far as is needed to see that both splits have documents.

    Args:
        names: of the source, for a message.

    Raises:
        UserError: there is no text, or too little for two documents.
    """
    for documents in (source, Pieces(source)):
        threshold = _threshold(documents, fraction)
        if threshold is None:
            raise UserError(f"data.source {list(names)} holds no text.")
        if threshold > 0 or fraction == 0:
            return documents, threshold
    raise UserError(
        f"data.source {list(names)} holds a single character, where one document to train on and another to hold "
        "out are needed; give it more text, or set data.validation_fraction=0."
    )


def _threshold(source: Documents, fraction: float) -> float | None:
    """As `divide` returns it; 0 if all documents are equal, None if there are none."""
    lowest, highest = 1.0, -1.0
    for text, _ in source:
        drawn = chance(text, "validation")
        lowest, highest = min(lowest, drawn), max(highest, drawn)
        if lowest < fraction <= highest or fraction == 0:
            return fraction
    if highest < 0:
        return None
    if lowest == highest:
        return 0.0
    return highest if highest < fraction else math.nextafter(lowest, 1.0)


class Pieces:
    """The documents of a source, each cut between words, or within the only one, into ten or fewer."""

    def __init__(self, source: Documents) -> None:
        self._source = source

    @property
    def size(self) -> int:
        """As of the source."""
        return self._source.size

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for text, position in self._source:
            words = text.split(" ")
            between = " " if len(words) > 1 else ""
            parts = words if between else list(text)
            length = -(-len(parts) // _PIECES)
            for first in range(0, len(parts), length):
                piece = between.join(parts[first : first + length])
                if piece and not piece.isspace():
                    yield piece, position
