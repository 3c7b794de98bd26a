"""Tallies of the lengths of conversations, which answer questions about any `data.seq_len` without the records."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from gemma2_jax.data.masks import MaskedTokens


@dataclass(frozen=True)
class Lengths:
    """How many conversations have which lengths: numbers of conversations by length.

    A length is a number of targets: a row of T tokens holds the first T targets of a conversation.

    Attributes:
        all: the conversations by their number of targets.
        to_loss: by the number of targets up to the first one with loss; conversations without loss are absent.
        to_end: by the number of targets up to the first terminator with loss; absent without one.
        loss_tokens: number of targets with loss, of all conversations.
    """

    all: dict[int, int] = field(default_factory=dict)
    to_loss: dict[int, int] = field(default_factory=dict)
    to_end: dict[int, int] = field(default_factory=dict)
    loss_tokens: int = 0

    @property
    def conversations(self) -> int:
        """Number of conversations."""
        return sum(self.all.values())

    def longer(self, targets: int) -> int:
        """Number of conversations of more than this number of targets."""
        return sum(count for length, count in self.all.items() if length > targets)

    def rows(self, targets: int) -> int:
        """Number of rows of this number of targets that the conversations, truncated to one row each, fill at least."""
        return sum(min(length, targets) * count for length, count in self.all.items()) // targets

    def with_loss(self, targets: int) -> int:
        """Number of conversations with loss within this number of targets."""
        return sum(count for length, count in self.to_loss.items() if length <= targets)

    def with_end(self, targets: int) -> int:
        """Number of conversations with a terminator that carries loss within this number of targets."""
        return sum(count for length, count in self.to_end.items() if length <= targets)


def lengths_of(tokens: MaskedTokens, end_of_turn: int) -> Lengths:
    """Returns the lengths of one conversation; `end_of_turn` is the id of the terminator."""
    loss = np.flatnonzero(tokens.loss)  # the token at index i is target i, counted from 1
    ends = loss[tokens.ids[loss] == end_of_turn]
    return Lengths(
        all={len(tokens.ids) - 1: 1},
        to_loss={int(index): 1 for index in loss[:1]},
        to_end={int(index): 1 for index in ends[:1]},
        loss_tokens=len(loss),
    )


class LengthTally:
    """Adds up `Lengths`."""

    def __init__(self) -> None:
        self._all: Counter[int] = Counter()
        self._to_loss: Counter[int] = Counter()
        self._to_end: Counter[int] = Counter()
        self._loss_tokens = 0

    def add(self, lengths: Lengths) -> None:
        """Adds those of further conversations."""
        self._all.update(lengths.all)
        self._to_loss.update(lengths.to_loss)
        self._to_end.update(lengths.to_end)
        self._loss_tokens += lengths.loss_tokens

    def finish(self) -> Lengths:
        """Returns the sum."""
        return Lengths(
            dict(sorted(self._all.items())),
            dict(sorted(self._to_loss.items())),
            dict(sorted(self._to_end.items())),
            self._loss_tokens,
        )
