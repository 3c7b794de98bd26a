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
            f"{key} is {rows} rows, which mesh.replica x mesh.data x mesh.fsdp = {shares} does not divide; choose a "
            f"multiple of {shares}."
        )
    if seq_len % parts:
        raise UserError(
            f"data.seq_len is {seq_len}, which mesh.sequence = {parts} does not divide; choose a multiple of {parts}."
        )
    feeding_share(mesh)
