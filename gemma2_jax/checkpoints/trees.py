"""Reads and checks the metadata of the arrays in a checkpoint's trees, before any array is read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gemma2_jax.checkpoints.failures import reading_checkpoint
from gemma2_jax.config import UserError


def array_metadata(path: Path, tree: str) -> Any:
    """Returns the metadata (shape, dtype) of each array in one of a checkpoint's trees."""
    with reading_checkpoint(path / tree):
        found = ocp.metadata(path, tree).metadata
    if found is None:  # what Orbax returns for a tree whose files it cannot read
        raise UserError(
            f"{path / tree} cannot be read as a checkpoint of a run: files are damaged or missing."
        )
    return found


def check_all_trees(path: Path, targets: Mapping[str, Any], beside: set[str], run_folder: Path) -> None:
    """Raises UserError if a checkpoint's trees are not those that a run needs to resume; reads no arrays.

    Args:
        beside: names of folders in the checkpoint that are not trees.
    """
    remedy = f"choose another output, or delete {run_folder} to train again."
    found = {item.name for item in path.iterdir() if item.is_dir()} - beside
    if found != set(targets):
        raise UserError(
            f"{path} was trained by another method: it holds {_listed(found)}, but this run needs {_listed(targets)}; "
            f"{remedy}"
        )
    try:
        check_trees(path, targets)
    except UserError as error:
        raise UserError(
            f"{str(error).removesuffix('.')}; another version may have saved it; {remedy}"
        ) from None


def check_trees(path: Path, targets: Mapping[str, Any]) -> None:
    """Raises UserError if arrays of a checkpoint are missing, superfluous or of another shape; reads no arrays."""
    for tree, target in targets.items():
        found = _shapes(array_metadata(path, tree))
        wanted = _shapes(target)
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                raise UserError(f"{path}/{tree} lacks {name} of shape {wanted[name]}.")
            if name not in wanted:
                raise UserError(f"{path}/{tree} holds {name}, which this configuration does not have.")
            if found[name] != wanted[name]:
                raise UserError(
                    f"{path}/{tree} holds {name} of shape {found[name]}, but this configuration has {wanted[name]}."
                )


def _listed(names: Iterable[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(path): tuple(leaf.shape) for path, leaf in leaves}


def name_of(path: Any) -> str:
    """Returns the path of a leaf, as `jax.tree_util` gives it, as text: "pairs/local_block/mlp/up"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
