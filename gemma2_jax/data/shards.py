"""Shards: ArrayRecord files of tokenised documents, and the manifest that describes a folder of them.

A record is the token ids of one document (bos, text, eos), little-endian, in the narrowest unsigned type
that holds the vocabulary.
"""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from pydantic import TypeAdapter, ValidationError

from gemma2_jax.config import UserError
from gemma2_jax.data.invalid import Skipped
from gemma2_jax.files import reason, write_text

FORMAT = 2  # of the folder; raised when a reader of the old one would misread the new one
MANIFEST = "manifest.json"
_BLOCK, _BLOCK_HEADER, _RECORD_OVERHEAD = 64 * 1024, 24, 50  # bytes, of an ArrayRecord file


@dataclass(frozen=True)
class Counts:
    """How much text. `tokens` include bos and eos; `bytes` are of the text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class File:
    """One file of records: its name in the folder, its size in bytes, and its sha256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Shard(File):
    """A file of documents, and how much text it holds."""

    counts: Counts


@dataclass(frozen=True)
class Part:
    """A stretch of the source that was tokenised as a whole.

    Attributes:
        documents: how many documents of the source it took, and
        sha256: of their texts in order: what an interrupted preparation recognises its source by.
        train, validation: where they went; None if none of them went there.
    """

    documents: int
    sha256: str
    train: Shard | None
    validation: Shard | None


@dataclass(frozen=True)
class DataManifest:
    """What a folder of shards holds; its manifest.json.

    Attributes:
        format: version of the folder's layout.
        complete: whether the whole source was tokenised.
        source, text_field, validation_fraction: as configured.
        identity: of the source's content, see `source_content.Content`.
        tokenizer: fingerprint of its model file.
        tokenizer_trained: whether it was trained on this source, by this preparation.
        vocab_size: V of that tokenizer.
        skipped: records of the source that were left out.
        vocabulary_full: whether it was trained on these documents, which support no larger one.
        parts: stretches of the source, in order.
    """

    format: int
    complete: bool
    source: tuple[str, ...]
    text_field: str
    validation_fraction: float
    identity: str
    tokenizer: str
    tokenizer_trained: bool
    vocab_size: int
    skipped: Skipped
    parts: tuple[Part, ...]
    vocabulary_full: bool = False  # Older folders lack this key.

    @property
    def dtype(self) -> np.dtype:
        """Type of a token id in a record."""
        return token_dtype(self.vocab_size)

    @property
    def train_shards(self) -> tuple[Shard, ...]:
        """Files of the training split, in order."""
        return tuple(part.train for part in self.parts if part.train)

    @property
    def validation_shards(self) -> tuple[Shard, ...]:
        """Files of the validation split, in order."""
        return tuple(part.validation for part in self.parts if part.validation)

    @property
    def train(self) -> Counts:
        """How much text there is to train on."""
        return sum((shard.counts for shard in self.train_shards), Counts())

    @property
    def validation(self) -> Counts:
        """How much text is held out."""
        return sum((shard.counts for shard in self.validation_shards), Counts())


@dataclass(frozen=True)
class _Formatted:
    """What manifests of every format have."""

    format: int


_ADAPTER = TypeAdapter(DataManifest)
_FORMATTED = TypeAdapter(_Formatted)

Described = TypeVar("Described")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest little-endian type that holds the ids 0 to vocab_size - 1."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_data_manifest(folder: Path, manifest: DataManifest) -> None:
    """Puts `manifest` in the place of the folder's manifest."""
    write_text(folder / MANIFEST, _ADAPTER.dump_json(manifest, indent=1).decode() + "\n")


def find_data_manifest(folder: str | os.PathLike[str]) -> DataManifest | None:
    """Returns the folder's manifest, complete or not, None if it has none.

    Raises:
        UserError: it cannot be read, is of another format, or files that it names are gone or cut.
    """
    manifest = read_described(
        "data.folder",
        folder,
        _ADAPTER,
        FORMAT,
        f"a manifest of prepared data; delete {folder} to prepare it anew",
        "prepare",
    )
    if manifest is not None:
        for shard in (*manifest.train_shards, *manifest.validation_shards):
            check_size(Path(folder), shard, "prepare")
    return manifest


def read_described(
    key: str,
    folder: str | os.PathLike[str],
    adapter: TypeAdapter[Described],
    format: int,
    expected: str,
    verb: str,
) -> Described | None:
    """Returns what the manifest in a folder says, None if there is none.

    Args:
        key: that is set to the folder.
        adapter: of the manifest's type; format: the one that this version reads.
        expected: what the file should have been, and what to do; verb: as in `check_content`.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{key} is {folder}, which cannot be used: {reason(error, path)}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not content.strip():
        raise UserError(f"{path} is empty; delete {folder} to {verb} it anew.")
    try:
        found = _FORMATTED.validate_json(content).format  # first, since another format may have other fields
        if found != format:
            raise UserError(
                f"{path} has format {found}, but this version reads format {format}; "
                f"delete {folder} to {verb} it anew."
            )
        return adapter.validate_json(content)
    except ValidationError:
        raise UserError(f"{path} is not {expected}.") from None


def check_size(folder: Path, shard: File, verb: str) -> None:
    """Raises UserError if a file is gone or cut; `verb` as in `check_content`."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.size:
        raise UserError(f"{path} is missing or not whole; delete {folder} to {verb} it anew.")


def read_data_manifest(folder: str | os.PathLike[str]) -> DataManifest:
    """Returns the manifest of a folder that was prepared completely.

    Raises:
        UserError: the folder was not prepared, or only in part; or as `find_data_manifest`.
    """
    manifest = find_data_manifest(folder)
    if manifest is None or not manifest.complete:
        state = "is not prepared" if manifest is None else "is prepared only in part"
        raise UserError(
            f"data.folder {folder} {state}; run `gemma2 data prepare` with the same configuration."
        )
    return manifest


def verify(folder: str | os.PathLike[str]) -> int:
    """Reads every shard of a prepared folder, and returns how many there are.

    Raises:
        UserError: a shard, which is named, is not as it was written; or as `read_data_manifest`.
    """
    manifest = read_data_manifest(folder)
    shards = (*manifest.train_shards, *manifest.validation_shards)
    for shard in shards:
        check_content(Path(folder), shard, "prepare")
    return len(shards)


def check_content(folder: Path, shard: File, verb: str) -> None:
    """Raises UserError if a file is not as it was written; `verb` says what to do once its folder is deleted."""
    path = folder / shard.file
    if _sha256(path) != shard.sha256:
        raise UserError(f"{path} has changed since it was written; delete {folder} to {verb} it anew.")


class RecordWriter:
    """Writes one file of records, which appears under its name only when it is whole."""

    def __init__(self, path: Path, options: str = "") -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        # 1: made for random access.
        self._writer = ArrayRecordWriter(str(self._temporary), f"group_size:1{options}")

    def write(self, record: bytes) -> None:
        self._writer.write(record)

    def finish(self) -> File:
        """Closes the file and moves it to its place.

        Raises:
            UserError: not all of it could be written.
        """
        try:
            self._writer.close()
        except RuntimeError as error:  # what was written to a full disk is told here only
            raise UserError(f"{self._path} could not be written: {str(error).partition(';')[0]}.") from None
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        written = File(self._path.name, self._temporary.stat().st_size, _sha256(self._temporary))
        os.replace(self._temporary, self._path)
        return written

    def abandon(self) -> None:
        """Closes the file and removes it."""
        with suppress(RuntimeError):  # not all of it could be written
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def record_file_size(records: int, content: int) -> int:
    """Bytes of a file that `RecordWriter` makes of so many records without compression, `content` bytes together.

    ArrayRecord pads what it writes to whole blocks, the file's own header too. Beside its content, a record takes a
    header and an entry of the index, both with its length as a varint; and each block has a header. Found by
    measurement of files from 1 to 130,000 records of 10 bytes to 1 MB: it is right to a block.
    """
    varint = -(-max(1, content // max(1, records)).bit_length() // 7)
    filled = content + records * (_RECORD_OVERHEAD + 2 * varint)
    return _BLOCK * (1 + max(1, -(-filled // (_BLOCK - _BLOCK_HEADER))))


class ShardWriter:
    """Writes one shard of documents, and counts what it holds."""

    def __init__(self, path: Path) -> None:
        self._records = RecordWriter(path)
        self._counts = Counts()

    def write(self, record: bytes, counts: Counts) -> None:
        """Appends the record of one document."""
        self._records.write(record)
        self._counts += counts

    def finish(self) -> Shard:
        """Closes the file and moves it to its place."""
        written = self._records.finish()
        return Shard(written.file, written.size, written.sha256, self._counts)

    def abandon(self) -> None:
        """Closes the file and removes it."""
        self._records.abandon()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
