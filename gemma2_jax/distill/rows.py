"""Checks that rows of data divide evenly over a mesh and its processes, for training and for a teacher's cache."""

from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import batch_shares, sequence_shares


def check_rows(rows: int, seq_len: int, mesh: Mesh, key: str) -> None:
    """Raises UserError if `rows`, the value of the setting `key`, do not divide evenly over the mesh and its processes.

    The layout in use determines how they are divided.
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
