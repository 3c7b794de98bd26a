"""Whether a source still is what it was: by the content of its files, which are read only where they may have changed.

A file whose size, inode and times are those that it had when it was hashed has not changed: nobody can set the time of
the last change of an inode (ctime), which every write sets, also one that puts the time of modification back. What
was seen of the files is kept beside the prepared data, for the next start; it is a memory and no more, and may be
deleted.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.progress import Progress, TaskID

from gemma2_jax.data.reading import reading
from gemma2_jax.data.sources import Source
from gemma2_jax.files import write_text

SEEN_FILE = ".source.json"  # in a prepared folder: what was seen of the source's files
# Nanoseconds that a file must have been left alone for when it is hashed. Another write within one tick of a file
# system's clock would leave its times as they are; the coarsest ticks are two seconds long.
_SETTLED = 2_000_000_000


@dataclass(frozen=True)
class Seen:
    """A file, as it was when its content was hashed.

    Attributes:
        path, size, inode: of the file; modified, changed: its mtime and ctime in nanoseconds.
        settled: whether another write would have given it other times than these.
        digest: of its content, `Source.digest`.
    """

    path: str
    size: int
    inode: int
    modified: int
    changed: int
    settled: bool
    digest: str


@dataclass(frozen=True)
class Content:
    """What a source holds.

    Attributes:
        identity: tells it from every other content, whatever the names and places of its files.
        files: in order.
    """

    identity: str
    files: tuple[Seen, ...]


_ADAPTER = TypeAdapter(tuple[Seen, ...])


def content_of(source: Source, seen: Sequence[Seen], progress: Progress) -> Content:
    """Returns what the source holds now; files that are as they were `seen` are not read again.

    Raises:
        UserError: a file cannot be read.
    """
    known = {each.path: each for each in seen}
    task = progress.add_task("reading data.source", total=source.size, visible=False)
    files = tuple(_look(source, path, known, progress, task) for path in source.files)
    progress.remove_task(task)
    digest = hashlib.sha256()
    for path, file in zip(source.files, files, strict=True):
        digest.update(f"{source.role(path)} {file.digest}\n".encode())
    return Content(f"{digest.hexdigest()[:16]} ({source.name})", files)


def _look(source: Source, path: Path, known: dict[str, Seen], progress: Progress, task: TaskID) -> Seen:
    begun = time.time_ns()
    name = str(path.absolute())
    with reading(path):
        found = path.stat()
    now = (found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    was = known.get(name)
    if was and was.settled and (was.size, was.inode, was.modified, was.changed) == now:
        progress.advance(task, found.st_size)
        return was

    def advance(size: int) -> None:
        progress.update(task, advance=size, visible=True)

    settled = found.st_ctime_ns + _SETTLED < begun
    return Seen(name, *now, settled, source.digest(path, advance))


def read_seen(folder: Path) -> tuple[Seen, ...]:
    """What was seen of the source of a prepared folder; nothing if it cannot be read."""
    try:
        return _ADAPTER.validate_json((folder / SEEN_FILE).read_bytes())
    except (OSError, ValidationError):
        return ()


def write_seen(folder: Path, content: Content) -> None:
    """Keeps what was seen, where the folder can be written to."""
    with suppress(OSError):
        write_text(folder / SEEN_FILE, _ADAPTER.dump_json(content.files, indent=1).decode() + "\n")


def changed_file(was: Sequence[Seen], now: Content) -> str | None:
    """The first file of a content that was not seen before; None where files are gone or in another order."""
    digests = {each.digest for each in was}
    return next((file.path for file in now.files if digests and file.digest not in digests), None)
