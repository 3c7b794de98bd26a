"""Where documents come from: the built-in corpus, or files of the user's own, read as a stream."""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import zstandard

from gemma2_jax.config import UserError
from gemma2_jax.data.python_docs import PythonDocs
from gemma2_jax.machine import is_installed

PYTHON_DOCS = "python-docs"
# Characters of a text file that make a document, about a thousand tokens: enough for context to matter, and
# few enough that one book is documents to shuffle, and to hold some out of.
TEXT_DOCUMENT = 4_000
LONGEST_DOCUMENT = 1_000_000  # characters: text without blank lines is cut here, so that memory stays bounded

_TEXT = (".txt", ".md", ".rst")
_FORMATS = (*_TEXT, ".jsonl", ".parquet")


class Source(Protocol):
    """Documents, in the same order every time."""

    @property
    def identity(self) -> str:
        """Names the content without reading it: a prepared folder belongs to one identity."""

    @property
    def size(self) -> int:
        """Bytes that are to be read, the measure of progress."""

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Yields each document that is not blank, with the bytes read so far."""


def open_source(sources: tuple[str, ...], text_field: str) -> Source:
    """Returns the documents that `data.source` and `data.text_field` name.

    Raises:
        UserError: a pattern matches no file, or a file of a kind that is not read.
    """
    return PythonDocs() if sources == (PYTHON_DOCS,) else Files(sources, text_field)


class Files:
    """Text, JSONL and Parquet files, in the order of their paths.

    A line of a JSONL file is one document, a row of a Parquet file is one. A text file is cut at blank lines:
    paragraphs make a document once they have 4,000 characters together, and a shorter file is one. What goes
    on for a million characters without a blank line is cut between lines, or within a line that is longer.
    Reading raises UserError, naming file and line, at whatever cannot be read.
    """

    def __init__(self, patterns: Iterable[str], text_field: str) -> None:
        self._files = _matches(patterns)
        self._text_field = text_field
        sizes = [path.stat().st_size for path in self._files]
        self.size = sum(sizes)
        listing = json.dumps([[str(path), size] for path, size in zip(self._files, sizes, strict=True)])
        digest = hashlib.sha256(listing.encode()).hexdigest()[:12]
        self.identity = f"{len(sizes)} files of {self.size:,} bytes ({digest})"

    def __iter__(self) -> Iterator[tuple[str, int]]:
        done = 0
        for path in self._files:
            with path.open("rb") as raw:
                for text in _documents(path, raw, self._text_field):
                    if text and not text.isspace():
                        yield text, done + raw.tell()
            done += path.stat().st_size


def _matches(patterns: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        paths = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            hint = f" (a folder: its files are {pattern.rstrip('/')}/**/*.txt)" if paths else ""
            raise UserError(
                f"data.source {pattern!r} matches no file{hint}; accepted: {PYTHON_DOCS}, or globs of "
                f"{', '.join(_FORMATS)} files, each optionally .gz or .zst."
            )
        found.update(files)
    for path in found:
        if _kind(path) not in _FORMATS:
            raise UserError(
                f"data.source matches {path}, which is of no known kind; accepted: {', '.join(_FORMATS)}, "
                "each optionally .gz or .zst."
            )
    parquet = next((path for path in sorted(found) if _kind(path) == ".parquet"), None)
    if parquet is not None and not is_installed("pyarrow"):
        raise _without_pyarrow(parquet)
    return sorted(found)


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in (".gz", ".zst") else suffix


def _documents(path: Path, raw: IO[bytes], text_field: str) -> Iterator[str]:
    stream = _decompressed(path, raw)
    if _kind(path) == ".parquet":
        return _parquet(path, stream, text_field)
    if _kind(path) == ".jsonl":
        return _jsonl(path, stream, text_field)
    return _text(path, stream)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]  # GzipFile is a binary stream in all but name
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(raw))
    return raw


def _text(path: Path, stream: IO[bytes]) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    after_blank = False
    for _, line in _lines(path, stream, LONGEST_DOCUMENT):
        blank = line.isspace()
        between_paragraphs = after_blank and not blank  # blank lines, however many, stay with what they end
        if (between_paragraphs and length >= TEXT_DOCUMENT) or length + len(line) > LONGEST_DOCUMENT:
            yield "".join(lines)
            lines, length = [], 0
        lines.append(line)
        length += len(line)
        after_blank = blank
    yield "".join(lines)


def _jsonl(path: Path, stream: IO[bytes], text_field: str) -> Iterator[str]:
    for number, line in _lines(path, stream):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(
                f"{path}, line {number}: not valid JSON; each line must be one JSON object."
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; each line must be one.")
        yield _checked(record.get(text_field), record.keys(), f"{path}, line {number}", text_field)


def _parquet(path: Path, stream: IO[bytes], text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # it is there, and broken
        raise _without_pyarrow(path) from None
    with tempfile.TemporaryFile() as seekable:  # Parquet is read from its end
        try:
            if path.suffix.lower() != ".parquet":
                for block in _blocks(path, stream):
                    seekable.write(block)
                stream = seekable
            file = parquet.ParquetFile(stream)
            names = file.schema_arrow.names
            if text_field not in names:
                _checked(None, names, str(path), text_field)
            row = 0
            for group in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in group.column(0).to_pylist():
                    row += 1
                    yield _checked(text, names, f"{path}, row {row}", text_field)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is not a whole Parquet file: {str(error).splitlines()[0].rstrip('.')}."
            ) from None


def _without_pyarrow(path: Path) -> UserError:
    return UserError(f"{path} needs pyarrow: pip install 'gemma2_jax[parquet]'.")


def _checked(text: Any, names: Iterable[str], place: str, text_field: str) -> str:
    """The value of the text field, if it is text that UTF-8 can express."""
    if text is None:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"{place}: no text in the field {text_field!r}; set data.text_field (fields there: {listed})."
        )
    if not isinstance(text, str):
        raise UserError(f"{place}: the field {text_field!r} holds {type(text).__name__}; it must hold text.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds a lone surrogate, which UTF-8 cannot express.") from None
    return text


def _lines(path: Path, stream: IO[bytes], longest: int = -1) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1; a byte order mark is left out.

    A line of more than `longest` bytes comes in several pieces under one number; -1 keeps every line whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end within a character
    number = length = 0  # lines read to their ends, and bytes read of the line after them
    try:
        for piece in iter(partial(stream.readline, longest), b""):
            first = number == length == 0
            length += len(piece)
            ends = piece.endswith(b"\n") or len(piece) != longest
            text = decoder.decode(piece, final=ends)
            yield number + 1, text.removeprefix("\ufeff") if first else text
            if ends:
                number, length = number + 1, 0
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        place = length - len(error.object) + error.start
        raise UserError(
            f"{path}, line {number + 1}: not valid UTF-8 (byte 0x{byte:02x} at {place})."
        ) from None
    except _CORRUPT as error:
        raise UserError(
            f"{path}, after line {number}: cannot be read on ({str(error).rstrip('.')})."
        ) from None


def _blocks(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        while block := stream.read(1 << 20):
            yield block
    except _CORRUPT as error:
        raise UserError(f"{path} cannot be decompressed ({str(error).rstrip('.')}).") from None


_CORRUPT = (OSError, EOFError, zlib.error, zstandard.ZstdError)


class _Zstandard(io.RawIOBase):
    """Decompresses frames one after another. (zstandard's own reader takes a file that was cut off for whole.)"""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")  # a view, since what is left of much must not be copied at every read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                compressed = self._frame.unused_data or self._raw.read(1 << 17)
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._begun = False
            else:
                compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._begun:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
