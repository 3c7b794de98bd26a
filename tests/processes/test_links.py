"""Who is heard over the connections between processes, who is silent, and who has gone."""

import socket
import threading
from collections.abc import Iterator

import pytest

from gemma2_jax.processes import links
from gemma2_jax.processes.links import LiveLinks, Lost


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SILENCE", 0.6)
    monkeypatch.setattr(links, "_BETWEEN_BEATS", 0.02)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Process 0's connections to three others, and theirs to it."""
    made = [socket.socketpair() for _ in range(3)]
    yield made
    for pair in made:
        for end in pair:
            end.close()


def test_a_silent_link_next_to_a_live_one(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    found = LiveLinks({number: near for number, (near, _) in enumerate(pairs, 1)}).lost()
    lively = [LiveLinks({0: pairs[place][1]}) for place in (0, 2)]
    assert next(found) == Lost([2], gone=False)
    for each in lively:
        each.send_farewell()
    assert list(found) == []


def test_one_whose_connection_ends(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    (near, far), *_ = pairs
    found = LiveLinks({1: near}).lost()
    far.send(b"h")
    far.close()
    assert list(found) == [Lost([1], gone=True)]


def test_related_losses_are_reported_together(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    found = LiveLinks({number: near for number, (near, _) in enumerate(pairs, 1)}).lost()
    lively = LiveLinks({0: pairs[0][1]})
    for _, far in pairs[1:]:
        far.close()
    assert next(found) == Lost([2, 3], gone=True)
    lively.send_farewell()
    assert list(found) == []


def test_messages_about_lost_processes() -> None:
    assert str(Lost([1], gone=True)) == "process 1 is gone: killed, or the host is down."
    assert str(Lost([1, 2], gone=True)) == "processes 1, 2 are gone: killed, or the host is down."
    assert str(Lost([0, 3], gone=False)).startswith("processes 0, 3 have not answered for 1 s: suspended")


def test_a_job_that_was_suspended_as_a_whole_goes_on(
    pairs: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every clock has moved by an hour when its processes run again."""
    (near, far), *_ = pairs
    found = LiveLinks({1: near}).lost()
    clock = iter(range(0, 3600 * 1000, 3600))
    monkeypatch.setattr(links.time, "monotonic", lambda: next(clock))
    heard: list[Lost] = []
    listening = threading.Thread(target=lambda: heard.extend(found))
    lively = LiveLinks({0: far})
    listening.start()
    listening.join(0.3)
    lively.send_farewell()
    listening.join(10)
    assert not listening.is_alive()
    assert heard == []
