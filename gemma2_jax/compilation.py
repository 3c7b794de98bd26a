"""The persistent compilation cache: compiled programs on disk, which later processes reuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from gemma2_jax.config import UserError, usable
from gemma2_jax.machine import is_installed


@contextmanager
def use_compilation_cache(folder: str | None) -> Iterator[None]:
    """Keeps the programs compiled inside in `folder`, and reuses programs that are there.

    JAX reuses a program for the same devices, flags, and versions of JAX and its compiler, whichever process compiled
    it: a run, or a plan on a machine without these devices. Programs that compile in less than a second are not kept.

    Args:
        folder: a folder, or a bucket (`gs://…`), which JAX writes to through gcsfs. None leaves JAX's own setting,
            which the environment variable JAX_COMPILATION_CACHE_DIR sets.

    Raises:
        UserError: the folder cannot be made, or the package that writes to the bucket is not installed.
    """
    if folder is None:
        yield
        return
    check_compilation_cache(folder)
    if "://" not in folder:
        with usable("compilation_cache", folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    _use(folder)
    try:
        yield
    finally:
        _use(before)


def check_compilation_cache(folder: str) -> None:
    """Raises UserError if `folder` is a URL other than `gs://…`, or a bucket and gcsfs is not installed."""
    scheme, is_url, _ = folder.partition("://")
    if is_url and scheme != "gs":
        raise UserError(
            f"compilation_cache is {folder}; accepted: a folder, or a bucket as in gs://name/folder."
        )
    if is_url and not is_installed("gcsfs"):
        raise UserError(f"compilation_cache is {folder}, which needs the package gcsfs: pip install gcsfs.")


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # otherwise JAX keeps the folder that it started with
