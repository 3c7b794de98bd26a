"""Reads the records of one file: text, JSONL or Parquet, compressed or not."""

import codecs
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import zstandard

from gemma2_jax.config import UserError
from gemma2_jax.data.fields import Fields, Record
from gemma2_jax.data.globs import kind_of, printable, without_pyarrow
from gemma2_jax.data.invalid import Invalid
from gemma2_jax.files import reason

# Characters of a text file per document, about a thousand tokens: enough for context to matter, and few enough that
# a single book gives many documents to shuffle and to hold out.
TEXT_DOCUMENT = 4_000
LONGEST_DOCUMENT = 1_000_000  # characters: text without blank lines is cut here, so that memory stays bounded

_LARGEST_WINDOW = 1 << 31  # bytes that a Zstandard frame may refer back
_DEEPEST_JSON = (
    500  # fixed here, since Python's own limit depends on its version and on the depth of the call stack
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# First bytes of the pointers that git leaves in place of a file whose content is stored elsewhere.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "fetch its content: git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "fetch its content: git annex get"),
}


class _DamagedError(Exception):
    """A file cannot be read to its end."""

    def __init__(self, place: str, problem: str, error: Exception) -> None:
        lines = str(error).splitlines() or [type(error).__name__]
        self.invalid = Invalid(place, problem, detail=lines[0].rstrip("."))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError, which is no fault of a record, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None


def records_of(path: Path, raw: IO[bytes], fields: Fields) -> Iterator[Record]:
    """Yields the records of a file that is open at its beginning; if it is damaged, the last record is invalid.

    Args:
        fields: makes the records of JSONL and Parquet files.

    Raises:
        OSError: the file cannot be read.
        UserError: the package that reads this file type is not installed.
    """
    start = raw.read(max(map(len, _POINTERS)))
    for begins, (problem, hint) in _POINTERS.items():
        if start.startswith(begins):
            yield Invalid(printable(path), problem, hint)
            return
    raw.seek(0)
    stream = _decompressed(path, raw)
    try:
        if kind_of(path) == ".parquet":
            yield from _parquet(path, stream, fields)
        elif kind_of(path) == ".jsonl":
            yield from _jsonl(path, stream, fields)
        else:
            yield from _text(path, stream)
    except _DamagedError as damaged:
        yield damaged.invalid


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]  # GzipFile is a binary stream in all but name
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(raw))
    return raw


def _text(path: Path, stream: IO[bytes]) -> Iterator[Record]:
    lines: list[str] = []
    length = 0
    invalid: Invalid | None = None  # the first of these lines that cannot be read
    after_blank = False
    for line in _lines(path, stream, LONGEST_DOCUMENT):
        blank = line.text.isspace()
        between_paragraphs = after_blank and not blank  # blank lines belong to the paragraph before them
        if (between_paragraphs and length >= TEXT_DOCUMENT) or length + len(line.text) > LONGEST_DOCUMENT:
            yield invalid or "".join(lines)
            lines, length, invalid = [], 0, None
        lines.append(line.text)
        length += len(line.text)
        invalid = invalid or line.invalid
        after_blank = blank
    yield invalid or "".join(lines)


def _jsonl(path: Path, stream: IO[bytes], fields: Fields) -> Iterator[Record]:
    name = printable(path)
    for line in _lines(path, stream):
        if not line.text.isspace():
            yield line.invalid or _of_json(line.text, f"{name}, line {line.number}", fields)


def _of_json(line: str, place: str, fields: Fields) -> Record:
    if (depth := _json_depth(line)) > _DEEPEST_JSON:
        return Invalid(
            place, "JSON nested too deeply", f"accepted: {_DEEPEST_JSON} levels", f"{depth:,} levels"
        )
    try:
        found = json.loads(line)
    except ValueError:
        return Invalid(place, "not valid JSON", "each line must be one JSON object")
    if not isinstance(found, dict):
        return Invalid(place, "not a JSON object", "each line must be one")
    return fields.record(found, found.keys(), place)


def _json_depth(line: str) -> int:
    """Returns the nesting depth of a line, or an upper bound if that is already within the limit."""
    brackets = line.count("[") + line.count("{")
    if brackets <= _DEEPEST_JSON:
        return brackets
    outside = _STRING.sub("", line)
    return max(accumulate((each in "[{") - (each in "]}") for each in outside), default=0)


def _parquet(path: Path, stream: IO[bytes], fields: Fields) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # installed, but broken
        raise without_pyarrow(path) from None
    name = printable(path)
    with tempfile.TemporaryFile() as seekable:  # Parquet is read from its end
        try:
            if path.suffix.lower() != ".parquet":
                shutil.copyfileobj(stream, seekable, 1 << 20)
                stream = seekable
            file = parquet.ParquetFile(stream)
            names = file.schema_arrow.names
            if missing := fields.missing(names, name):
                yield missing
                return
            columns = names if fields.column is None else [fields.column]
            row = 0
            for group in file.iter_batches(batch_size=1024, columns=columns):
                for values in zip(*map(_values, group.columns), strict=True):
                    row += 1
                    yield _of_row(
                        dict(zip(group.schema.names, values, strict=True)),
                        names,
                        f"{name}, row {row}",
                        fields,
                    )
        except (pyarrow.ArrowException, UnicodeDecodeError, *_CORRUPT) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise _DamagedError(name, "a damaged or incomplete Parquet file", error) from None


def _values(column: Any) -> list[Any]:
    """Returns the values of an Arrow array, with a UnicodeDecodeError in place of each that is not UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _of_row(row: dict[str, Any], names: list[str], place: str, fields: Fields) -> Record:
    for value in row.values():
        if isinstance(value, UnicodeDecodeError):
            return _not_utf8(place, value, value.start)
    return fields.record(row, names, place)


def _not_utf8(place: str, error: UnicodeDecodeError, position: int) -> Invalid:
    return Invalid(place, "not valid UTF-8", detail=f"byte 0x{error.object[error.start]:02x} at {position}")


@dataclass(frozen=True)
class _Line:
    """A line with its newline, or a piece of a long one; if it is not valid UTF-8, `invalid` is set."""

    number: int
    text: str
    invalid: Invalid | None


def _lines(path: Path, stream: IO[bytes], longest: int = -1) -> Iterator[_Line]:
    """Yields lines, numbered from 1, without a byte order mark.

    A line of more than `longest` bytes is yielded as several pieces with the same number; -1 keeps every line whole.
    """
    name = printable(path)
    decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end within a character
    number = length = 0  # complete lines read, and bytes read of the current line

    def decoded(piece: bytes, final: bool) -> _Line:
        try:
            return _Line(number + 1, decoder.decode(piece, final), None)
        except UnicodeDecodeError as error:
            decoder.reset()
            position = length - len(error.object) + error.start
            invalid = _not_utf8(f"{name}, line {number + 1}", error, position)
            return _Line(number + 1, error.object.decode(errors="replace"), invalid)

    try:
        for piece in iter(partial(stream.readline, longest), b""):
            first = number == length == 0
            length += len(piece)
            ends = piece.endswith(b"\n") or len(piece) != longest
            line = decoded(piece, ends)
            yield replace(line, text=line.text.removeprefix("\ufeff")) if first else line
            if ends:
                number, length = number + 1, 0
        rest = decoded(b"", True)
        if rest.invalid:
            yield rest
    except _CORRUPT as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise _DamagedError(f"{name}, after line {number}", "the rest cannot be read", error) from None


_CORRUPT = (OSError, EOFError, zlib.error, zstandard.ZstdError)


class _Zstandard(io.RawIOBase):
    """Decompresses frames one after another. (zstandard's own reader does not notice a truncated file.)"""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = self._new_frame()
        self._begun = False
        self._ready = memoryview(b"")  # a view, so that reading part of a large block does not copy the rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                compressed = self._frame.unused_data or self._raw.read(1 << 17)
                self._frame = self._new_frame()
                self._begun = False
            else:
                compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._begun:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            self._begun = True
            self._ready = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    @staticmethod
    def _new_frame() -> Any:
        # The largest window of `zstd --long=31`; it is allocated only if a frame needs it.
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def _decompress(self, compressed: bytes) -> bytes:
        try:
            content: bytes = self._frame.decompress(compressed)
            return content
        except zstandard.ZstdError as error:
            if "too much memory" not in str(error):
                raise
            raise zstandard.ZstdError(
                "its window is larger than 2 GiB; compress it again with zstd --long=31 or less"
            ) from None
