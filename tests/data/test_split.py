"""Both splits of every text have documents."""

from collections.abc import Iterator

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.split import divide
from gemma2_jax.data.tokenise import chance, is_validation


class Documents:
    """A source in memory, which counts how many of its documents were read."""

    identity = "documents"

    def __init__(self, texts: list[str]) -> None:
        self._texts, self.read = texts, 0
        self.size = sum(map(len, texts))

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for text in self._texts:
            self.read += 1
            yield text, 0


def split(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The documents to train on, and those held out."""
    source, threshold = divide(Documents(texts), ("here",), fraction)
    found = [text for text, _ in source]
    held_out = [text for text in found if is_validation(text, threshold)]
    return [text for text in found if text not in held_out], held_out


TEXTS = [f"note {number}" for number in range(9)]


def test_at_least_one_document_is_held_out() -> None:
    train, held_out = split(TEXTS, 0.001)
    assert held_out == [min(TEXTS, key=lambda text: chance(text, "validation"))]
    assert sorted(train + held_out) == TEXTS
    assert split(TEXTS[::-1], 0.001)[1] == held_out  # by content


def test_at_least_one_document_is_left_to_train_on() -> None:
    train, held_out = split(TEXTS, 0.999)
    assert train == [max(TEXTS, key=lambda text: chance(text, "validation"))]
    assert len(held_out) == 8


def test_where_both_have_some_the_fraction_decides() -> None:
    assert split(TEXTS, 0.5)[1] == [text for text in TEXTS if is_validation(text, 0.5)]
    many = Documents([f"document {number}" for number in range(5000)])
    assert divide(many, ("here",), 0.1)[1] == 0.1
    assert many.read < 200  # no further than to the first of each


def test_a_fraction_of_zero_holds_nothing_out() -> None:
    assert split(TEXTS, 0.0) == (TEXTS, [])
    assert split(["alone"], 0.0) == (["alone"], [])


@pytest.mark.parametrize("text", ["one file of one line", "word", "ab", "并没有空格的一行", "x " * 500])
@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_lone_document_is_cut(text: str, fraction: float) -> None:
    train, held_out = split([text], fraction)
    assert train
    assert held_out
    pieces = [piece for piece, _ in divide(Documents([text]), ("here",), fraction)[0]]
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="holds no text"):
        split([], 0.1)
    with pytest.raises(UserError, match="holds no text"):
        split([], 0.0)
    with pytest.raises(UserError, match=r"\['here'\] holds a single character"):
        split(["x"], 0.1)
