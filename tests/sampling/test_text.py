"""Text is streamed without a broken character, and nothing of it is lost."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma2_jax.sampling.text import TextStream


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_pieces_join_to_the_text(tokenizer, text, sizes):
    """Whatever the sizes of the portions in which the tokens come; most characters here are byte tokens."""
    ids = tokenizer.encode(text)
    stream, start = TextStream(tokenizer), 0
    pieces: list[str] = []
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    # What has been shown is never taken back.
    assert text.startswith("".join(pieces))
    assert "".join([*pieces, stream.finish()]) == text


def test_a_character_waits_for_its_last_byte(tokenizer):
    ids = tokenizer.encode("a🙂é")
    assert len(ids) == 1 + 4 + 2
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.finish() == ""


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_text_cut_within_a_character_shows_it(tokenizer, cut):
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("ab🙂")[: 2 + cut]) == "ab"
    assert stream.finish() == "\ufffd" * cut


def test_bytes_that_never_become_a_character_do_not_hold_the_text_up(tokenizer):
    continuation = tokenizer.encode("🙂")[-1]
    stream = TextStream(tokenizer)
    given_so_far = "".join(stream.push([continuation]) for _ in range(10))
    assert given_so_far == "\ufffd" * 7
    assert stream.push(tokenizer.encode("a")) + stream.finish() == "\ufffd" * 3 + "a"


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab🙂", max_size=20),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=3), min_size=1, max_size=2),
    sizes=st.lists(st.integers(1, 4), min_size=1),
)
@example(text="baa", stops=["a", "baa"], sizes=[1])
@example(text="baa", stops=["a", "baa"], sizes=[4])
def test_a_text_ends_where_the_first_complete_stop_begins(tokenizer, text, stops, sizes):
    """Also one that comes in several portions, however large; nothing of it is shown."""
    ids = tokenizer.encode(text)
    stream, start = TextStream(tokenizer, stops), 0
    pieces: list[str] = []
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    end = min(found)[1] if found else len(text)
    assert "".join([*pieces, stream.finish()]) == text[:end]
    assert stream.ended == any(stop in text for stop in stops)


def test_what_may_become_a_stop_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ["b🙂c"])
    assert [stream.push([token]) for token in tokenizer.encode("ab🙂b🙂")] == [
        "a",
        *[""] * 5,
        "b🙂",
        *[""] * 4,
    ]
    assert stream.push(tokenizer.encode("c")) == ""
    assert stream.ended
    assert stream.push(tokenizer.encode("d")) + stream.finish() == ""
