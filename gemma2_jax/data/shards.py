"""Shards: ArrayRecord files of tokenised documents, and the manifest that describes a folder of them.

A record holds the token ids of one document (bos, text, eos), little-endian, in the narrowest unsigned type that can
hold the vocabulary. The record of a conversation also holds its loss mask (see masks.py).
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
from gemma2_jax.data.config import ConversationsConfig
from gemma2_jax.data.invalid import Skipped
from gemma2_jax.data.lengths import Lengths, LengthTally
from gemma2_jax.files import reason, write_text

# Formats of the folder: text, conversations, and a mixture, whose parts are those of the folders below. They differ so
# that older versions do not read the records of conversations as text.
FORMAT, CONVERSATIONS_FORMAT, MIXTURE_FORMAT = 2, 3, 4
MANIFEST = "manifest.json"
_BLOCK, _BLOCK_HEADER, _RECORD_OVERHEAD = 64 * 1024, 24, 50  # bytes, of an ArrayRecord file


@dataclass(frozen=True)
class Counts:
    """Amounts of text. `tokens` include bos and eos; `bytes` counts the text in UTF-8."""

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
    """A file of documents and the amount of text in it.

    Attributes:
        lengths: lengths of its conversations; None for text.
    """

    counts: Counts
    lengths: Lengths | None = None  # Older folders lack this key.


@dataclass(frozen=True)
class Part:
    """A part of the source: consecutive documents that were tokenised and written together.

    Attributes:
        documents: number of its documents.
        sha256: hash of their texts in order, by which a resumed preparation recognises the source.
        train, validation: the shard of each split; None if no document belongs to that split.
    """

    documents: int
    sha256: str
    train: Shard | None
    validation: Shard | None


@dataclass(frozen=True)
class DataManifest:
    """The content of a folder of shards, stored as its manifest.json.

    Attributes:
        format: version of the folder's layout.
        complete: whether the whole source was tokenised.
        source, text_field, validation_fraction: as configured.
        identity: identity of the source's content, see `source_content.Content`.
        tokenizer: fingerprint of the tokenizer's model file.
        tokenizer_trained: whether this preparation trained the tokenizer on this source.
        vocab_size: V of the tokenizer.
        skipped: records of the source that were left out.
        parts: parts of the source, in order.
        vocabulary_full: whether the tokenizer was trained on these documents and they support no larger vocabulary.
        conversations: settings that the conversations were encoded with; None for text.
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
    conversations: ConversationsConfig | None = None  # Older folders lack this key.

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the token ids in a record."""
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
        """Amount of text in the training split."""
        return sum((shard.counts for shard in self.train_shards), Counts())

    @property
    def validation(self) -> Counts:
        """Amount of text in the validation split."""
        return sum((shard.counts for shard in self.validation_shards), Counts())

    @property
    def train_lengths(self) -> Lengths:
        """Lengths of the conversations in the training split."""
        return _lengths(self.train_shards)

    @property
    def validation_lengths(self) -> Lengths:
        """Lengths of the conversations in the validation split."""
        return _lengths(self.validation_shards)


def _lengths(shards: tuple[Shard, ...]) -> Lengths:
    tally = LengthTally()
    for shard in shards:
        tally.add(shard.lengths or Lengths())
    return tally.finish()


@dataclass(frozen=True)
class _Formatted:
    """The part that manifests of every format have in common."""

    format: int


_ADAPTER = TypeAdapter(DataManifest)
_FORMATTED = TypeAdapter(_Formatted)

Described = TypeVar("Described")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest little-endian dtype for the ids 0 to vocab_size - 1."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_data_manifest(folder: Path, manifest: DataManifest) -> None:
    """Writes `manifest` to the folder, replacing an older one."""
    write_text(folder / MANIFEST, _ADAPTER.dump_json(manifest, indent=1).decode() + "\n")


def find_data_manifest(folder: str | os.PathLike[str]) -> DataManifest | None:
    """Returns the folder's manifest, complete or not; None if it has none.

    Raises:
        UserError: the manifest cannot be read or has another format, or files that it lists are missing or truncated.
    """
    manifest = read_described(
        "data.folder",
        folder,
        _ADAPTER,
        (FORMAT, CONVERSATIONS_FORMAT, MIXTURE_FORMAT),
        f"a manifest of prepared data; delete {folder} to prepare it again",
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
    formats: tuple[int, ...],
    expected: str,
    verb: str,
) -> Described | None:
    """Returns the manifest in a folder; None if there is none.

    Args:
        key: config key that names the folder, for messages.
        adapter: adapter of the manifest's type; formats: the formats that this version reads.
        expected: what the file should be, and what to do otherwise; verb: as in `check_content`.

    Raises:
        UserError: the manifest cannot be read or has another format.
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
        raise UserError(f"{path} is empty; delete {folder} to {verb} it again.")
    try:
        found = _FORMATTED.validate_json(content).format  # first, since another format may have other fields
        if found not in formats:
            raise UserError(
                f"{path} has format {found}, but this version reads format {_alternatives(formats)}; "
                f"delete {folder} to {verb} it again."
            )
        return adapter.validate_json(content)
    except ValidationError:
        raise UserError(f"{path} is not {expected}.") from None


def _alternatives(formats: tuple[int, ...]) -> str:
    *others, last = map(str, formats)
    return f"{', '.join(others)} or {last}" if others else last


def check_size(folder: Path, shard: File, verb: str) -> None:
    """Raises UserError if a file is missing or truncated; `verb` as in `check_content`."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.size:
        raise UserError(f"{path} is missing or incomplete; delete {folder} to {verb} it again.")


def read_data_manifest(folder: str | os.PathLike[str]) -> DataManifest:
    """Returns the manifest of a completely prepared folder.

    Raises:
        UserError: the folder is not prepared, or only in part; or as `find_data_manifest`.
    """
    manifest = find_data_manifest(folder)
    if manifest is None or not manifest.complete:
        state = "is not prepared" if manifest is None else "is prepared only in part"
        raise UserError(
            f"data.folder {folder} {state}; run `gemma2 data prepare` with the same configuration."
        )
    return manifest


def verify(folder: str | os.PathLike[str]) -> int:
    """Reads every shard of a prepared folder and returns the number of shards.

    Raises:
        UserError: a shard has changed since it was written; or as `read_data_manifest`.
    """
    manifest = read_data_manifest(folder)
    shards = (*manifest.train_shards, *manifest.validation_shards)
    for shard in shards:
        check_content(Path(folder), shard, "prepare")
    return len(shards)


def check_content(folder: Path, shard: File, verb: str) -> None:
    """Raises UserError if a file has changed since it was written.

    Args:
        verb: the verb in the message's "delete FOLDER to ... it again".
    """
    path = folder / shard.file
    if _sha256(path) != shard.sha256:
        raise UserError(f"{path} has changed since it was written; delete {folder} to {verb} it again.")


class RecordWriter:
    """Writes one file of records, which appears under its name only when it is complete."""

    def __init__(self, path: Path, options: str = "") -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        # Groups of one record allow random access.
        self._writer = ArrayRecordWriter(str(self._temporary), f"group_size:1{options}")

    def write(self, record: bytes) -> None:
        self._writer.write(record)

    def finish(self) -> File:
        """Closes the file and gives it its final name.

        Raises:
            UserError: not all of it could be written.
        """
        try:
            self._writer.close()
        except RuntimeError as error:  # only here does ArrayRecord report earlier writes to a full disk
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
    """Returns the bytes of a file that `RecordWriter` writes without compression.

    ArrayRecord pads everything to whole blocks, including the file's header. Besides its content, each record has a
    header and an index entry, both with its length as a varint, and each block has a header. Derived from measured
    files of 1 to 130,000 records of 10 bytes to 1 MB; exact to within one block.

    Args:
        records: number of records.
        content: total bytes of the records.
    """
    varint = -(-max(1, content // max(1, records)).bit_length() // 7)
    filled = content + records * (_RECORD_OVERHEAD + 2 * varint)
    return _BLOCK * (1 + max(1, -(-filled // (_BLOCK - _BLOCK_HEADER))))


class ShardWriter:
    """Writes one shard of documents and counts its text."""

    def __init__(self, path: Path) -> None:
        self._records = RecordWriter(path)
        self._counts = Counts()
        self._lengths: LengthTally | None = None

    def write(self, record: bytes, counts: Counts, lengths: Lengths | None = None) -> None:
        """Appends the record of one document; `lengths` are those of a conversation."""
        self._records.write(record)
        self._counts += counts
        if lengths is not None:
            self._lengths = self._lengths or LengthTally()
            self._lengths.add(lengths)

    def finish(self) -> Shard:
        """Closes the file and gives it its final name."""
        written = self._records.finish()
        lengths = None if self._lengths is None else self._lengths.finish()
        return Shard(written.file, written.size, written.sha256, self._counts, lengths)

    def abandon(self) -> None:
        """Closes the file and removes it."""
        self._records.abandon()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
