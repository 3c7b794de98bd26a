"""Text from tokens that are still arriving."""

from collections.abc import Iterable, Sequence

from gemma2_jax.data.tokenizer import Tokenizer

_CUT = "\ufffd"  # what a byte decodes to that is no whole character, or not yet
_LONGEST_CUT = 3  # bytes of UTF-8 that can still become a character: it has at most four


class TextStream:
    """Decodes a row's tokens as they come, never half a character.

    A character may be spelt by several byte tokens, so the last bytes of the text are held back as long as
    they are none but may become one. So is what may become one of the texts that end it.

    Args:
        stop: the text ends where the first of these to be complete begins.

    Attributes:
        ended: whether one of them has come; what is pushed after it gives nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._given = 0  # characters
        self.ended = False

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is certain now and was not given before."""
        if self.ended:
            return ""
        self._ids.extend(ids)
        text, self.ended = self._until_stop()
        if self.ended:
            return self._give(text, len(text))
        cut = len(text) - len(text.rstrip(_CUT))
        certain = text[: len(text) - min(cut, _LONGEST_CUT)]
        return self._give(text, self._beginning_of_stop(certain))

    def finish(self) -> str:
        """Returns what was held back, when no more tokens will come."""
        if self.ended:
            return ""
        text, self.ended = self._until_stop()
        return self._give(text, len(text))

    def _until_stop(self) -> tuple[str, bool]:
        """The text so far, up to the stop that is complete first, and whether there is one.

        Not the one that begins first: that may come whole with the same portion of tokens, or not.
        """
        text = self._tokenizer.decode(self._ids)
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return (text[: min(found)[1]], True) if found else (text, False)

    def _beginning_of_stop(self, text: str) -> int:
        """Where the end of the text may be the beginning of a stop; its length if nowhere."""
        lengths = [
            length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])
        ]
        return len(text) - max(lengths, default=0)

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece
