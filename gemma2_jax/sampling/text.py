"""Text from tokens that are still arriving."""

from collections.abc import Iterable, Sequence

from gemma2_jax.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # the text of a byte that is no whole character, or not yet
_MAX_INCOMPLETE = 3  # bytes of UTF-8 that can still become a character, which has at most four


class TextStream:
    """Decodes a row's tokens as they arrive, in whole characters.

    A character may be spelt by several byte tokens, so bytes at the end of the text are held back while they may still
    become a character. So is text that may still become a stop text.

    Args:
        stop: stop texts; the text ends where the first of these to be complete begins.

    Attributes:
        ended: whether a stop text is complete; tokens pushed after that give no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._returned = 0  # characters
        self.ended = False

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is certain now and was not returned before."""
        if self.ended:
            return ""
        self._ids.extend(ids)
        text, self.ended = self._until_stop()
        if self.ended:
            return self._new_part(text, len(text))
        incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        certain = text[: len(text) - min(incomplete, _MAX_INCOMPLETE)]
        return self._new_part(text, self._beginning_of_stop(certain))

    def finish(self) -> str:
        """Returns the text that was held back, once no more tokens will come."""
        if self.ended:
            return ""
        text, self.ended = self._until_stop()
        return self._new_part(text, len(text))

    def _until_stop(self) -> tuple[str, bool]:
        """The text so far, up to the stop text that is complete first, and whether there is one.

        It is not the stop text that begins first: whether that is complete depends on how many tokens arrive together.
        """
        text = self._tokenizer.decode(self._ids)
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return (text[: min(found)[1]], True) if found else (text, False)

    def _beginning_of_stop(self, text: str) -> int:
        """Where the end of the text may be the beginning of a stop text; the text's length if nowhere."""
        lengths = [
            length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])
        ]
        return len(text) - max(lengths, default=0)

    def _new_part(self, text: str, end: int) -> str:
        piece = text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece
