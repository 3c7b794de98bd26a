"""Whether a source still is what it was: by the content of its files, which are read only where they may have changed.

A file with the same size, inode and times as when it was hashed has the same content: every write sets the time of the
inode's last change (ctime), and no program can set it back, as `touch -r` does with the time of modification. Sizes,
times and hashes are kept beside the prepared data for the next start; without them, all files are read again.
"""

import hashlib
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.progress import Progress, TaskID

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.globs import NothingMatchesError, printable
from gemma2_jax.data.reading import reading
from gemma2_jax.data.shards import DataManifest
from gemma2_jax.data.sources import DocumentSource, open_documents
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
        digest: of its content, `DocumentSource.digest`.
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


def content_of(source: DocumentSource, seen: Sequence[Seen], progress: Progress) -> Content:
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


def _look(
    source: DocumentSource, path: Path, known: dict[str, Seen], progress: Progress, task: TaskID
) -> Seen:
    begun = time.time_ns()
    name = printable(path.absolute())
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


def difference(identity: str, seen: Sequence[Seen], now: Content) -> str:
    """Returns what is not as it was seen, as a clause in parentheses; both identities where nothing was seen.

    That is the first file with new content, else the first that is gone, else how the names have changed: they give
    the files their order, and their endings say how they are read.
    """
    if not seen:
        return f"{identity}, now {now.identity}"
    before, after = ([file.digest for file in files] for files in (seen, now.files))
    if added := [file.path for file in now.files if file.digest not in before]:
        return added[0]
    if gone := [file.path for file in seen if file.digest not in after]:
        return f"{gone[0]} is gone"
    if sorted(before) != sorted(after):
        return f"{len(before)} files, now {len(after)}: other copies of the same content"
    same = "no file's content has changed, only "
    moved = next((number for number, digest in enumerate(before) if digest != after[number]), None)
    if moved is None:
        renamed = next(pair for pair in zip(seen, now.files, strict=True) if pair[0].path != pair[1].path)
        return (
            f"{same}the names, whose endings say how to read a file: {renamed[1].path} was {renamed[0].path}"
        )
    return (
        f"{same}the order of the files, which their paths give: {now.files[moved].path} now comes where "
        f"{seen[moved].path} was; rename the files to restore it"
    )


def content_now(manifest: DataManifest, data: DataConfig, progress: Progress) -> Content | None:
    """What the source holds at present; None if it is gone, which a prepared folder may outlive."""
    try:
        source = open_documents(data.sources, data.text_field, data.skip_invalid)
    except NothingMatchesError:
        if data.sources == manifest.source:
            return None
        raise
    return content_of(source, read_seen(Path(data.folder)), progress)


def free_beside(folder: Path) -> Path:
    """The first name of a folder beside `folder` that is free."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if not name.exists())


def refuse_other_content(manifest: DataManifest, data: DataConfig, content: Content | None) -> None:
    """Raises UserError if data.source holds other text than was prepared, whatever its files are called."""
    folder = Path(data.folder)
    seen = read_seen(folder)
    if content is None:
        return
    if content.identity == manifest.identity:
        if content.files != seen:
            write_seen(folder, content)
        return
    trained = " and the file of tokenizer.path, trained on that text" if manifest.tokenizer_trained else ""
    remedy = f"set another folder, as in data.folder={free_beside(folder)}, or delete this one{trained}"
    if data.sources != manifest.source:
        raise UserError(
            f"data.folder {folder} was prepared from data.source {list(manifest.source)}, and {list(data.sources)} "
            f"holds other text; {remedy}."
        )
    changed = difference(manifest.identity, seen, content)
    raise UserError(f"data.source has changed since data.folder {folder} was prepared ({changed}); {remedy}.")


def unchanged(source: DocumentSource, content: Content, folder: Path, progress: Progress) -> Content:
    """The content of a source that was read to its end. Raises UserError if it is no longer what it was before."""
    now = content_of(source, content.files, progress)
    if now.identity != content.identity:
        changed = difference(content.identity, content.files, now)
        raise UserError(
            f"data.source changed while it was prepared ({changed}); delete {folder} and run the same command again."
        )
    return now
