"""What a prompt is continued with, while its tokens arrive: text, tokens, and why it ended."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.text import TextStream


@dataclass(frozen=True)
class Draw:
    """Which sample of which prompt a row is, both counted from 0; its randomness follows from that and the seed.

    Sample k of seed N is the first of seed N + k.
    """

    prompt: int
    sample: int = 0


class Completion:
    """One row's continuation, without its prompt.

    Args:
        stop: the ids that end it.

    Attributes:
        text: whole characters only; all that there will be once `stop_reason` is set.
        tokens: the new ones, without the stop token that ended the row, but with those of a stop text.
        stop_reason: `stop` for a stop token or text, `length` for `max_new_tokens`; None while the row goes on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Set[int], config: SamplingConfig) -> None:
        self._stream = TextStream(tokenizer, config.stop_texts)
        self._stop, self._most = stop, config.max_new_tokens
        self.text = ""
        self.tokens: list[int] = []
        self.stop_reason: Literal["stop", "length"] | None = None

    def push(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens, of which a stop token is the last; none where the row has ended already."""
        if self.stop_reason is not None:
            return
        new = list(tokens)
        if new and new[-1] in self._stop:
            new.pop()
            self.stop_reason = "stop"
        self.tokens += new
        self.text += self._stream.push(new)
        if self.stop_reason is None and len(self.tokens) == self._most:
            self.stop_reason = "length"
        if self.stop_reason is not None:
            self.text += self._stream.finish()
        if self._stream.ended:
            self.stop_reason = "stop"
