"""How the rows that a teacher and its students read are divided over a mesh and its processes."""

from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import batch_shares, sequence_shares


def check_rows(rows: int, seq_len: int, mesh: Mesh, key: str) -> None:
    """Raises UserError if `rows`, which the setting `key` gives, cannot be split evenly over the mesh or its processes.

    As the layout in use splits them.
    """
    shares, parts = batch_shares(mesh), sequence_shares(mesh)
    if rows % shares:
        raise UserError(
            f"{key} is {rows} rows, which the {shares} devices along the mesh's replica, data and fsdp axes do not "
            f"divide; choose a multiple of {shares}."
        )
    if seq_len % parts:
        raise UserError(
            f"data.seq_len is {seq_len}, which the {parts} devices along the mesh's sequence axis do not divide; "
            f"choose a multiple of {parts}."
        )
    feeding_share(mesh)
