"""Sources of documents: the built-in corpus, or the user's files, read as a stream."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from gemma2_jax.data.config import PYTHON_DOCS, ConversationsConfig
from gemma2_jax.data.conversations import ConversationFields
from gemma2_jax.data.fields import Fields, TextField
from gemma2_jax.data.globs import kind_of, match_files
from gemma2_jax.data.invalid import Invalid, Skipped, Skipping
from gemma2_jax.data.python_docs import PythonDocs
from gemma2_jax.data.reading import reading, records_of


class Documents(Protocol):
    """An iterable of documents, in the same order every time.

    A document is a text; with `data.conversations`, it is the JSON of a conversation (see conversations.py).
    """

    @property
    def size(self) -> int:
        """Bytes to be read, the measure of progress."""

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Yields each non-blank document with the bytes read so far."""


class DocumentSource(Documents, Protocol):
    """The documents of some files.

    Attributes:
        name: a short description of the source.
        files: files to read, in order.
        skipped: records that were left out; set once the source has been read to its end.
    """

    name: str
    files: list[Path]
    skipped: Skipped

    def role(self, path: Path) -> str:
        """Returns what determines the documents of a file besides its content."""

    def digest(self, path: Path, advance: Callable[[int], None]) -> str:
        """Returns the sha256 of a file's content in hexadecimal; calls `advance` with the size of each block read."""


def open_documents(
    sources: tuple[str, ...],
    text_field: str,
    skip_invalid: float = 0,
    conversations: ConversationsConfig | None = None,
) -> DocumentSource:
    """Returns the documents of `data.source`; the arguments are the keys of `data` with the same names.

    Raises:
        UserError: a pattern matches no file, or more unreadable matches than `data.skip_invalid` allows.
    """
    if sources == (PYTHON_DOCS,):
        return PythonDocs()
    fields: Fields = TextField(text_field) if conversations is None else ConversationFields(conversations)
    return Files(sources, fields, skip_invalid)


class Files:
    """Text, JSONL and Parquet files, in the order of their paths.

    Each line of a JSONL file and each row of a Parquet file is one document. Text files are cut at blank lines: a
    document ends with the paragraph that brings it to 4,000 characters, and a shorter file is one document. A million
    characters without a blank line are cut between lines, or within a longer line. Iterating raises UserError, with
    file and line, at the first invalid record beyond what `data.skip_invalid` allows.
    """

    def __init__(self, patterns: Iterable[str], fields: Fields, skip_invalid: float) -> None:
        self.files, self._others = match_files(patterns, fields.formats)
        self._fields, self._skip_invalid = fields, skip_invalid
        self._sizes = [_size(path) for path in self.files]
        self.size = sum(self._sizes)
        self.name = f"{len(self.files):,} files of {self.size:,} bytes"
        self.skipped = Skipped()
        self._begin()  # raises at once if too many matches cannot be read

    def __iter__(self) -> Iterator[tuple[str, int]]:
        skipping, records, done = self._begin(), len(self._others), 0
        for path, size in zip(self.files, self._sizes, strict=True):
            with reading(path), path.open("rb") as raw:
                for record in records_of(path, raw, self._fields):
                    records += 1
                    if isinstance(record, Invalid):
                        skipping.add(record)
                    elif record and not record.isspace():
                        yield record, done + raw.tell()
            done += size
        self.skipped = skipping.finish(records)

    def _begin(self) -> Skipping:
        skipping = Skipping(self._skip_invalid)
        for other in self._others:
            skipping.add(other)
        return skipping

    def role(self, path: Path) -> str:
        kind = kind_of(path)
        compression = path.suffix.lower()
        return f"{kind} {compression} {self._fields.identity if kind in ('.jsonl', '.parquet') else ''}"

    def digest(self, path: Path, advance: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        with reading(path), path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                advance(len(block))
        return digest.hexdigest()


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size
