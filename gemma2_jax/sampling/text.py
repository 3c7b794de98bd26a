"""Text from tokens that are still arriving."""

from collections.abc import Iterable

from gemma2_jax.data.tokenizer import Tokenizer

_CUT = "\ufffd"  # what a byte decodes to that is no whole character, or not yet
_LONGEST_CUT = 3  # bytes of UTF-8 that can still become a character: it has at most four


class TextStream:
    """Decodes a row's tokens as they come, never half a character.

    A character may be spelt by several byte tokens, so the last bytes of the text are held back as long as
    they are none but may become one.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is certain now and was not given before."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        held = len(text) - len(text.rstrip(_CUT))
        return self._give(text, len(text) - min(held, _LONGEST_CUT))

    def finish(self) -> str:
        """Returns what was held back, when no more tokens will come."""
        text = self._tokenizer.decode(self._ids)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece
