"""Splits documents into training and validation by a hash of their content, so that neither split is empty."""

import math
from collections.abc import Iterator

from gemma2_jax.config import UserError
from gemma2_jax.data.sources import Documents
from gemma2_jax.data.tokenise import chance

_PIECES = 10  # at most, of a single document


def divide(
    source: Documents, names: tuple[str, ...], fraction: float, conversations: bool = False
) -> tuple[Documents, float]:
    """Returns the documents of `source` and a threshold: documents whose `chance` is below it are held out.

    The threshold is `fraction`, unless that would leave a split empty: then the document with the lowest chance is
    held out, or the one with the highest is kept for training. A source of one text is cut into pieces first.
    Reads the source only until both splits have a document.

    Args:
        names: values of `data.source`, for error messages.
        conversations: whether the documents are conversations, which are not cut.

    Raises:
        UserError: there is no text, or too little for two documents.
    """
    for documents in (source,) if conversations else (source, Pieces(source)):
        threshold = _threshold(documents, fraction)
        if threshold is None:
            raise UserError(
                f"data.source {list(names)} holds no {'conversation' if conversations else 'text'}."
            )
        if threshold > 0 or fraction == 0:
            return documents, threshold
    if conversations:
        raise UserError(
            f"data.source {list(names)} holds one conversation, or several equal ones, too little for training and "
            "validation; add others, or set data.validation_fraction=0."
        )
    raise UserError(
        f"data.source {list(names)} holds a single character, too little for a training and a validation document; "
        "add more text, or set data.validation_fraction=0."
    )


def _threshold(source: Documents, fraction: float) -> float | None:
    """Returns the threshold of `divide`; 0 if all documents are equal, None if there are none."""
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
    """The documents of a source, each cut into at most ten pieces between words, or within a single word."""

    def __init__(self, source: Documents) -> None:
        self._source = source

    @property
    def size(self) -> int:
        """Size of the source in bytes."""
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
