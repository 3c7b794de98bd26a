"""Which rows of a batch a process feeds, on meshes over processes that are not there."""

from types import SimpleNamespace
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.sharding import feeding
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.mesh import AXES


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "batch_sharding", lambda mesh: mesh.sharding)


def a_mesh(data: int, fsdp: int, tensor: int, each: int) -> Any:
    """A row for each device along data and fsdp; `each` devices, one after another, are of one process."""

    def rows_of_devices(shape: tuple[int]) -> Any:
        size = shape[0] // (data * fsdp)
        places = [
            (SimpleNamespace(process_index=number // each), number // tensor * size)
            for number in range(data * fsdp * tensor)
        ]
        return SimpleNamespace(items=lambda: [(device, (slice(row, row + size),)) for device, row in places])

    sharding = SimpleNamespace(devices_indices_map=rows_of_devices)
    return SimpleNamespace(shape=dict(zip(AXES, (1, data, fsdp, 1, tensor), strict=True)), sharding=sharding)


@pytest.mark.parametrize(
    ("mesh", "shares"),
    [
        (a_mesh(1, 8, 1, each=4), [(0, 2), (1, 2)]),
        (a_mesh(2, 2, 2, each=4), [(0, 2), (1, 2)]),  # a process has two rows, each twice
        (a_mesh(1, 2, 8, each=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes have the same row
        (a_mesh(1, 1, 8, each=4), [(0, 1), (0, 1)]),
    ],
    ids=["rows", "rows-and-heads", "heads-over-two", "heads-over-all"],
)
def test_processes_with_the_same_rows_feed_the_same(mesh: Any, shares: list[tuple[int, int]]) -> None:
    assert [feeding_share(mesh, process) for process in range(len(shares))] == shares


def test_rows_that_are_shared_in_part_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"mesh fsdp=4 x tensor=3 makes two of the 3 processes share some of their rows"
    ):
        feeding_share(a_mesh(1, 4, 3, each=4), 0)
