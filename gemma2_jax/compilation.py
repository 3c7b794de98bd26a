"""Programs that are compiled once: XLA's results kept on disk, for the next process that would compile the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from gemma2_jax.config import UserError, usable
from gemma2_jax.machine import is_installed


@contextmanager
def programs_kept_in(folder: str | None) -> Iterator[None]:
    """What is compiled within is kept in `folder`, or taken from there if it was compiled before.

    JAX finds a program again for the same devices, flags, and versions of JAX and its compiler, whoever compiled it: a
    run, or a plan on a machine without these devices. What compiles within a second is not kept.

    Args:
        folder: or a bucket (`gs://…`), which JAX writes to by gcsfs; None leaves JAX's own setting, which the variable
            JAX_COMPILATION_CACHE_DIR sets.

    Raises:
        UserError: the folder cannot be made, or what would write to the bucket is not installed.
    """
    if folder is None:
        yield
        return
    check_programs_folder(folder)
    if "://" not in folder:
        with usable("compilation_cache", folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    _use(folder)
    try:
        yield
    finally:
        _use(before)


def check_programs_folder(folder: str) -> None:
    """Raises UserError if `folder` is of no kind that programs are kept in, or its package is not installed."""
    scheme, is_url, _ = folder.partition("://")
    if is_url and scheme != "gs":
        raise UserError(
            f"compilation_cache is {folder}; accepted: a folder, or a bucket as in gs://name/folder."
        )
    if is_url and not is_installed("gcsfs"):
        raise UserError(f"compilation_cache is {folder}, which needs the package gcsfs: pip install gcsfs.")


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it would go on with the folder that it began with
