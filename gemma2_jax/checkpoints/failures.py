"""Turns whatever Orbax raises and logs when it cannot read or write a checkpoint into a single error."""

import gc
import inspect
import logging
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma2_jax.config import UserError
from gemma2_jax.messages import one_line

_LONGEST_WAIT = 30  # seconds
_QUIET = 0.2  # seconds without a late error, after which no more are expected
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_ORBAX_PATHS = ("/orbax/checkpoint/", "/tensorstore/", "/etils/")  # in paths of source files


def reading_checkpoint(path: Path) -> AbstractContextManager[None]:
    """Turns Orbax's failure to read `path` into a UserError of one sentence."""
    return _orbax(lambda reason: UserError(f"{path} cannot be read as a checkpoint of a run: {reason}."))


def writing_checkpoint(folder: Path) -> AbstractContextManager[None]:
    """Turns Orbax's failure to write into `folder` into an OSError, raised once nothing in the folder changes."""
    return _orbax(partial(_not_written, folder))


@contextmanager
def _orbax(translate: Callable[[str], Exception]) -> Iterator[None]:
    """Raises `translate(reason)` if Orbax or the file system fails.

    Orbax's own logs and tracebacks are hidden. Other errors (out of memory, a bug in the code inside) are raised
    unchanged.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hook = sys.unraisablehook
    leftovers = _Leftovers(hook)
    sys.unraisablehook = leftovers
    reason = None
    try:
        yield
    except Exception as error:
        origin = _origin(error)
        if not _is_from_orbax(origin):
            raise origin from None
        reason = one_line(origin)
        del origin
        _release_frames(error)
        leftovers.wait()
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if reason is not None:
        raise translate(reason) from None


class _Leftovers:
    """A `sys.unraisablehook` that hides the late errors of a failed Orbax call: reads whose event loop is closed, and
    coroutines that never ran."""

    def __init__(self, hook: Callable[[Any], None]) -> None:
        self._hook = hook
        self._last = time.monotonic()

    def __call__(self, unraisable: Any) -> None:
        if _is_left_over(unraisable):
            self._last = time.monotonic()
        else:
            self._hook(unraisable)

    def wait(self) -> None:
        """Returns once no late error has come for `_QUIET` seconds."""
        begun = time.monotonic()
        while time.monotonic() < min(max(begun, self._last) + _QUIET, begun + _LONGEST_WAIT):
            time.sleep(_QUIET / 4)


def _is_left_over(unraisable: Any) -> bool:
    codes = [frame.f_code for frame, _ in traceback.walk_tb(unraisable.exc_traceback)]
    if inspect.iscoroutine(unraisable.object):
        codes.append(unraisable.object.cr_code)
    in_orbax = any(_ORBAX_PATHS[0] in code.co_filename for code in codes)
    return in_orbax or str(unraisable.exc_value) == "Event loop is closed"


def _origin(error: BaseException) -> BaseException:
    """Returns the original error inside Orbax's wrappers."""
    while error.__cause__ is not None and _is_from_orbax(error):
        error = error.__cause__
    return error


def _release_frames(error: BaseException | None) -> None:
    """Releases the reads that an error's frames hold, so that their late errors come now and not at any later time."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _is_from_orbax(error: BaseException) -> bool:
    """Whether an error comes from the file system or Orbax: one of its exception types, or raised in its code."""
    if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
        return False
    if isinstance(error, OSError) or type(error).__module__.startswith("orbax."):
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [file for file in files if not _in_standard_library(file)]
    return bool(own) and any(name in own[-1] for name in _ORBAX_PATHS)


def _in_standard_library(file: str) -> bool:
    return file.startswith((_STANDARD_LIBRARY, "<")) and "-packages" not in file


def _not_written(folder: Path, reason: str) -> OSError:
    """Waits until nothing in a folder that Orbax failed to write changes, and returns the error to raise.

    Orbax fails at the first failed write and cannot wait for the others, which would recreate files and folders after
    the caller has removed them.
    """
    before: set[tuple[str, int]] | None = None
    for _ in range(_LONGEST_WAIT):
        found = set()
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_mtime_ns))
        if found == before:
            break
        before = found
        time.sleep(1.0)
    return OSError(reason)
