"""Finds out whether the content of a source has changed, reading only the files that may have changed.

A file with the same size, inode and times as when it was hashed has the same content: every write sets the time of the
inode's last change (ctime), and no program can set it back, as `touch -r` does with the modification time. Sizes,
times and hashes are stored beside the prepared data for the next start; without them, all files are read again.
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

HASHES_FILE = ".source.json"  # in a prepared folder: the `HashedFile`s of its source
# Nanoseconds without a change after which a file's times can be trusted. A second write within one tick of the file
# system's clock leaves the times as they are; the coarsest clocks tick every two seconds.
_SETTLED = 2_000_000_000


@dataclass(frozen=True)
class HashedFile:
    """A file as it was when its content was hashed.

    Attributes:
        path, size, inode: the file's; modified, changed: its mtime and ctime in nanoseconds.
        settled: whether any later write must change these times.
        digest: `DocumentSource.digest` of its content.
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
    """The content of a source.

    Attributes:
        identity: a string that is unique to this content, wherever its files are and whatever they are called.
        files: the source's files, in order.
    """

    identity: str
    files: tuple[HashedFile, ...]


_ADAPTER = TypeAdapter(tuple[HashedFile, ...])


def content_of(source: DocumentSource, hashed: Sequence[HashedFile], progress: Progress) -> Content:
    """Returns the source's current content; does not read `hashed` files again if they have not changed.

    Raises:
        UserError: a file cannot be read.
    """
    known = {each.path: each for each in hashed}
    task = progress.add_task("reading data.source", total=source.size, visible=False)
    files = tuple(_hash_file(source, path, known, progress, task) for path in source.files)
    progress.remove_task(task)
    digest = hashlib.sha256()
    for path, file in zip(source.files, files, strict=True):
        digest.update(f"{source.role(path)} {file.digest}\n".encode())
    return Content(f"{digest.hexdigest()[:16]} ({source.name})", files)


def _hash_file(
    source: DocumentSource, path: Path, known: dict[str, HashedFile], progress: Progress, task: TaskID
) -> HashedFile:
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
    return HashedFile(name, *now, settled, source.digest(path, advance))


def read_hashes(folder: Path) -> tuple[HashedFile, ...]:
    """Returns the hashed files of a prepared folder's source; an empty tuple if they cannot be read."""
    try:
        return _ADAPTER.validate_json((folder / HASHES_FILE).read_bytes())
    except (OSError, ValidationError):
        return ()


def write_hashes(folder: Path, content: Content) -> None:
    """Writes the hashed files into the folder, if it is writable."""
    with suppress(OSError):
        write_text(folder / HASHES_FILE, _ADAPTER.dump_json(content.files, indent=1).decode() + "\n")


def difference(identity: str, hashed: Sequence[HashedFile], now: Content) -> str:
    """Returns what has changed since the files were hashed, for a message; both identities if `hashed` is empty.

    That is the first file with new content, else the first that is gone, else how the names have changed: names
    determine the order of the files, and their endings how the files are read.
    """
    if not hashed:
        return f"{identity}, now {now.identity}"
    before, after = ([file.digest for file in files] for files in (hashed, now.files))
    if added := [file.path for file in now.files if file.digest not in before]:
        return added[0]
    if gone := [file.path for file in hashed if file.digest not in after]:
        return f"{gone[0]} is gone"
    if sorted(before) != sorted(after):
        return f"{len(before)} files, now {len(after)}: other copies of the same content"
    same = "no file's content has changed, only "
    moved = next((number for number, digest in enumerate(before) if digest != after[number]), None)
    if moved is None:
        renamed = next(pair for pair in zip(hashed, now.files, strict=True) if pair[0].path != pair[1].path)
        return f"{same}the names, whose endings determine how a file is read: {renamed[1].path} was {renamed[0].path}"
    return (
        f"{same}the order of the files, which follows their paths: {now.files[moved].path} is now in the place of "
        f"{hashed[moved].path}; rename the files to restore it"
    )


def current_content(manifest: DataManifest, data: DataConfig, progress: Progress) -> Content | None:
    """Returns the source's current content; None if the source was deleted, which leaves prepared data usable."""
    try:
        source = open_documents(data.sources, data.text_field, data.skip_invalid, data.conversations)
    except NothingMatchesError:
        if data.sources == manifest.source:
            return None
        raise
    return content_of(source, read_hashes(Path(data.folder)), progress)


def unused_sibling(folder: Path) -> Path:
    """Returns the first of FOLDER-2, FOLDER-3, ... that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if not name.exists())


def refuse_other_content(manifest: DataManifest, data: DataConfig, content: Content | None) -> None:
    """Raises UserError if the text of data.source is not the text that was prepared; file names do not matter."""
    folder = Path(data.folder)
    hashed = read_hashes(folder)
    if content is None:
        return
    if content.identity == manifest.identity:
        if content.files != hashed:
            write_hashes(folder, content)
        return
    trained = " and the file of tokenizer.path, trained on that text" if manifest.tokenizer_trained else ""
    remedy = f"set another folder, as in data.folder={unused_sibling(folder)}, or delete this one{trained}"
    if data.sources != manifest.source:
        raise UserError(
            f"data.folder {folder} was prepared from data.source {list(manifest.source)}, but {list(data.sources)} "
            f"contains different text; {remedy}."
        )
    changed = difference(manifest.identity, hashed, content)
    raise UserError(f"data.source has changed since data.folder {folder} was prepared ({changed}); {remedy}.")


def unchanged(source: DocumentSource, content: Content, folder: Path, progress: Progress) -> Content:
    """Returns the content again, after a source was read. Raises UserError if it changed meanwhile."""
    now = content_of(source, content.files, progress)
    if now.identity != content.identity:
        changed = difference(content.identity, content.files, now)
        raise UserError(
            f"data.source changed during preparation ({changed}); delete {folder} and run the same command again."
        )
    return now
