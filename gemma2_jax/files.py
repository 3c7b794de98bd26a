"""Files that are either whole or absent, and folders that one process at a time works in."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from gemma2_jax.stops import cleanup


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

    If nothing has come into the folder in the end, it is gone again, and so are those above that were made for it; but
    with `wait`, since others may wait for the file that is locked.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    path = Path(folder)
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock = path / ".lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

        def let_go() -> None:
            with suppress(OSError):  # the folder is gone already
                if not wait and list(path.iterdir()) == [lock]:
                    lock.unlink()
                    _remove_empty(made)

        with cleanup(let_go):
            yield


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # there is something in it
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
