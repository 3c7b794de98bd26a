"""Which rows of a batch each process feeds: those that its devices hold."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.sharding.layout import batch_sharding, batch_shares


def feeding_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """The part of a batch's rows that a process (by default this one) feeds: its index, and the number of equal parts.

    The layout in use decides. Processes whose devices hold the same rows, as when heads are split over hosts, feed the
    same part.

    Raises:
        UserError: two processes have some rows in common, but not all.
    """
    rows = batch_shares(mesh)
    held: dict[int, set[int]] = {}
    places: Mapping[Any, tuple[slice, ...]] = batch_sharding(mesh).devices_indices_map((rows,))
    for device, (index, *_) in places.items():
        held.setdefault(device.process_index, set()).update(range(*index.indices(rows)))
    of_process = {number: tuple(sorted(taken)) for number, taken in held.items()}
    parts = sorted(set(of_process.values()))
    if sum(map(len, parts)) != rows or len({len(part) for part in parts}) > 1:
        shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        raise UserError(
            f"mesh {shape} makes two of the {len(held)} processes share some of their rows of a batch, but not all; "
            "choose mesh.tensor x mesh.sequence so that it divides the number of devices per process, or is a multiple "
            "of that number."
        )
    return parts.index(of_process[jax.process_index() if process is None else process]), len(parts)
