"""The completion of a prompt while its tokens arrive: text, tokens, and why it stopped."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.text import TextStream


@dataclass(frozen=True)
class Draw:
    """Which sample of which prompt a row is, both counted from 0; together with the seed they determine its randomness.

    Sample k with seed N equals the first sample with seed N + k.
    """

    prompt: int
    sample: int = 0


class Completion:
    """The completion of one row, without its prompt.

    Args:
        stop: ids of the tokens that end it.

    Attributes:
        text: whole characters only; final once `stop_reason` is set.
        tokens: new tokens, without the stop token that ended the row, but with the tokens of a stop text.
        stop_reason: `stop` for a stop token or text, `length` for `max_new_tokens`; None while the row continues.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Set[int], config: SamplingConfig) -> None:
        self._stream = TextStream(tokenizer, config.stop_texts)
        self._stop, self._max_tokens = stop, config.max_new_tokens
        self.text = ""
        self.tokens: list[int] = []
        self.stop_reason: Literal["stop", "length"] | None = None

    def push(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens, of which only the last may be a stop token; ignores them if the row has ended."""
        if self.stop_reason is not None:
            return
        new = list(tokens)
        if new and new[-1] in self._stop:
            new.pop()
            self.stop_reason = "stop"
        self.tokens += new
        self.text += self._stream.push(new)
        if self.stop_reason is None and len(self.tokens) == self._max_tokens:
            self.stop_reason = "length"
        if self.stop_reason is not None:
            self.text += self._stream.finish()
        if self._stream.ended:
            self.stop_reason = "stop"
