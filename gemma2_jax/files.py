"""Files that are either complete or absent, and folders that one process at a time works in."""

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

LOCK = ".lock"  # the lock file in a folder that `locked` holds


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` atomically as UTF-8, making its folder if needed."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path` atomically, making its folder if needed."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file or folder made there replaces `path` at the end.

    Makes the folder of `path` if needed. After an exception, `path` is unchanged and the temporary file or folder is
    removed. A folder can replace only an empty folder.
    """
    with beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, making its folder if needed; what is there at the end is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The random part separates writers of the same file, even on different hosts; the last one to finish wins.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with cleanup(partial(_remove, temporary)):
        yield temporary


@contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the exclusive right to make `path`, making its folder if needed.

    Removes temporary files that killed writers left beside it. If `path` is not made in the end, the folders made for
    it are removed.

    Raises:
        BlockingIOError: another process holds the right.
    """
    target = Path(path)
    made = [folder for folder in target.parents if not folder.exists()]
    with cleanup(partial(_remove_empty, made)):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with cleanup(lock.unlink):
                # Names that `replacing` gives, perhaps nested.
                left = re.compile(rf"\.+{re.escape(target.name)}(\.[0-9a-f]{{8}}\.tmp)+")
                for beside in target.parent.iterdir():
                    if left.fullmatch(beside.name):
                        _remove(beside)
                yield


@contextmanager
def locked(folder: str | os.PathLike[str], wait: bool) -> Iterator[None]:
    """Holds the lock of `folder`, making the folder if needed; the lock ends with the process, however that ends.

    A folder that is empty at the end is removed, together with the folders that were made above it.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    path = Path(folder)
    lock = path / LOCK
    with ExitStack() as stack:
        while True:
            made = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
            try:
                file = stack.enter_context(lock.open("w"))
            except FileNotFoundError:  # Another process has removed the folder meanwhile.
                continue
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, lock):
                break  # Otherwise the previous holder has removed it.

        def release() -> None:
            with suppress(OSError):  # the folder is gone already
                if list(path.iterdir()) == [lock]:
                    lock.unlink()
                    _remove_empty(made)

        with cleanup(release):
            yield


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether a process holds the lock of `folder`. Locks of other hosts show only where the file system shares them.

    It takes the lock together with other readers and only for an instant, since `flock` has no other way to ask.
    """
    try:
        with (Path(folder) / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file
        return False
    return False


def in_the_way(path: str | os.PathLike[str]) -> Path | None:
    """Returns the file (or other non-folder) on the way to `path` that rules out a folder there, or None."""
    return _walk(path)[1]


def folders_to_extend(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the existing folders in which another one has to be made before `path` is a folder; none if it is one."""
    return [folder.absolute() for folder in _walk(path)[0]]


def _walk(path: str | os.PathLike[str]) -> tuple[list[Path], Path | None]:
    """Follows `path` from its first folder, as if missing folders were made on the way.

    So `missing/../file` leads to `file`, which a look at the whole path does not find.

    Returns:
        The existing folders in which one has to be made, up to the first obstacle, and the obstacle or None.
    """
    extended: list[Path] = []
    folder, missing = Path(), 0  # the last existing folder, and the number of missing ones below it
    for part in Path(path).parts:
        if missing:
            missing += -1 if part == ".." else 1
        elif os.path.isdir(folder / part):
            folder = folder / part
        elif os.path.lexists(folder / part):
            return extended, folder / part
        else:
            extended.append(folder)
            missing = 1
    return extended, None


def reason(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Returns why `path` (by default the error's own path) cannot be used, and names a file that is in the way."""
    place = error.filename if path is None else path
    if isinstance(error, FileExistsError | NotADirectoryError):
        file = in_the_way(place) if isinstance(place, str | os.PathLike) else None
        return "a file is in its place, or above it" if file is None else obstacle_clause(file)
    return error.strerror or str(error)


def obstacle_clause(path: Path) -> str:
    """Returns the clause of a message about what `in_the_way` found."""
    return f"{path} is {'a file' if path.is_file() else 'not a folder'}, where a folder is needed"


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


@contextmanager
def undone_after(error: type[Exception], *paths: Path, unless: Callable[[], bool]) -> Iterator[None]:
    """After `error`, removes what was made inside the block, unless `unless()` is true.

    Args:
        paths: files and folders. What was in the folders before stays. Folders that were made above them are removed
            too, if they are empty.
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
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
        raise


def _at(path: Path) -> list[Path]:
    """The file, if it exists, or the entries of the folder."""
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
