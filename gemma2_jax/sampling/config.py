"""The settings of text generation."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2_jax.config import refuse

_MOST_TOKENS = 2**30  # so that positions are int32, also those of a cache that is larger than needed


@dataclass(frozen=True)
class SamplingConfig:
    """How prompts are completed.

    Attributes:
        max_new_tokens: maximum number of tokens added to each prompt.
        temperature: divisor of the logits; 0 always takes the most likely token (greedy).
        top_k: choose only among the k most likely tokens; null for all of them.
        top_p: then choose only among the fewest most likely tokens that together have this probability; null for all.
        seed: the same seed, prompts and settings give the same text.
        stop_tokens: ids of tokens that end a row and are not part of its text; null for those of the checkpoint or, if
            it names none, the tokenizer's end of text and end of turn; an empty list for none.
        stop_texts: texts that end a row's text where one of them begins. Functions that return tokens ignore them.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"sampling.max_new_tokens is {self.max_new_tokens}; it must be at least 1."
        if self.max_new_tokens > _MOST_TOKENS:
            yield f"sampling.max_new_tokens is {self.max_new_tokens}; it must be at most {_MOST_TOKENS}."
        if not 0 <= self.temperature < float("inf"):
            yield f"sampling.temperature is {self.temperature}; it must be a number from 0 (greedy) upwards."
        if self.top_k is not None and self.top_k < 1:
            yield f"sampling.top_k is {self.top_k}; it must be at least 1, or null for all tokens."
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1, or null for all tokens."
        if not 0 <= self.seed < 2**32:
            yield f"sampling.seed is {self.seed}; it must be from 0 to 4294967295."
        for token in self.stop_tokens or ():
            if token < 0:
                yield f"sampling.stop_tokens holds {token}; token ids begin at 0."
        if "" in self.stop_texts:
            yield "sampling.stop_texts holds an empty text, which would stop every text at once; leave it out."
