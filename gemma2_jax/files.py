"""Files that are either whole or absent, and folders that one process at a time works in."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from gemma2_jax.stops import cleanup

LOCK = ".lock"  # in a folder that `locked` holds


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 to `path`, making its folder; a reader never sees half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path`, making its folder; a reader never sees half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path`, making its folder; the file or folder made there takes the place of `path`.

    After an exception `path` is as it was, and what was made is gone. A folder replaces an empty one only.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The random part keeps two writers of the same file apart, on whatever hosts; the last one to finish wins.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with cleanup(partial(_remove, temporary)):
        yield temporary
        os.replace(temporary, target)


@contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the right to make `path`, making its folder.

    What earlier writers that were killed have left beside it is removed, and so are the folders made if `path` does
    not come to be.

    Raises:
        BlockingIOError: another process holds it.
    """
    target = Path(path)
    made = [folder for folder in target.parents if not folder.exists()]
    with cleanup(partial(_remove_empty, made)):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with cleanup(lock.unlink):
                # Of `replacing`, or of one within another.
                left = re.compile(rf"\.+{re.escape(target.name)}(\.[0-9a-f]{{8}}\.tmp)+")
                for beside in target.parent.iterdir():
                    if left.fullmatch(beside.name):
                        _remove(beside)
                yield


@contextmanager
def locked(folder: str | os.PathLike[str], wait: bool) -> Iterator[None]:
    """Holds the lock of `folder`, making the folder; a process that ends in any way lets go of it.

    If nothing has come into the folder in the end, it is gone again, and so are those above that were made for it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    path = Path(folder)
    lock = path / LOCK
    with ExitStack() as stack:
        while True:
            made = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
            try:
                file = stack.enter_context(lock.open("w"))
            except FileNotFoundError:  # Another process has removed the folder since.
                continue
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, lock):
                break  # Else the process that held it has removed it meanwhile.

        def let_go() -> None:
            with suppress(OSError):  # the folder is gone already
                if list(path.iterdir()) == [lock]:
                    lock.unlink()
                    _remove_empty(made)

        with cleanup(let_go):
            yield


def in_the_way(path: str | os.PathLike[str]) -> Path | None:
    """Returns what is in the place of a folder at `path` or above it, such as a file; None if there is nothing."""
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            return None
        if os.path.lexists(place):
            return place
    return None


def nearest_folder(path: str | os.PathLike[str]) -> Path:
    """Returns `path` itself if it is a folder, else the nearest folder above it."""
    whole = Path(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def reason(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Returns why a file or folder at `path` (the error's own by default) cannot be used: what is in its way, if so."""
    place = error.filename if path is None else path
    if isinstance(error, FileExistsError | NotADirectoryError):
        file = in_the_way(place) if isinstance(place, str | os.PathLike) else None
        return "a file is in its place, or above it" if file is None else no_folder(file)
    return error.strerror or str(error)


def no_folder(path: Path) -> str:
    """Returns the clause about what `in_the_way` has found."""
    return f"{path} is {'a file' if path.is_file() else 'no folder'}, where a folder is needed"


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # there is something in it
            folder.rmdir()


@contextmanager
def undone_after(error: type[Exception], *paths: Path, unless: Callable[[], bool]) -> Iterator[None]:
    """After `error`, removes what was made meanwhile, unless that is to be kept.

    Args:
        paths: files, and folders, of which what was in them before stays. Folders made above them are removed as well,
            if nothing else is in them.
    """
    above = {folder for path in paths for folder in path.parents if not folder.exists()}
    before = {path for each in paths for path in _at(each)}
    try:
        yield
    except error:
        if not unless():
            for path in {path for each in paths for path in _at(each)} - before:
                _remove(path)
            for folder in sorted(above, key=lambda folder: len(folder.parts), reverse=True):
                with suppress(OSError):  # there is something in it
                    folder.rmdir()
        raise


def _at(path: Path) -> list[Path]:
    """A file, if it is there, or what is in a folder."""
    return list(path.iterdir()) if path.is_dir() else [path] if path.exists() else []


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
