"""The manifest of a teacher's cache: its files, and the data, teacher and settings that it was made for."""

from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter

from gemma2_jax.config import UserError, as_override, to_dict
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.shards import (
    MANIFEST,
    File,
    check_content,
    check_size,
    read_data_manifest,
    read_described,
)
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.records import LogGrid
from gemma2_jax.files import write_text
from gemma2_jax.messages import written

FORMAT = 3  # version of the folder's format; raised when code for the old one would misread the new one


@dataclass(frozen=True)
class DataOrder:
    """Everything that determines the tokens in row i of the training data, and the file that holds the row.

    Attributes:
        documents: identity of the prepared data.
        tokenizer: fingerprint of its tokenizer.
        process_count: number of processes that each batch's rows are divided among.
    """

    documents: str
    tokenizer: str
    validation_fraction: float
    seed: int
    seq_len: int
    batch_size: int
    process_count: int
    streams: int = 1  # Older caches lack this key.
    shuffle_buffer: int = 0  # Older caches lack this key.

    @classmethod
    def of(cls, data: DataConfig, process_count: int) -> "DataOrder":
        manifest = read_data_manifest(data.folder)
        return cls(
            documents=manifest.identity,
            tokenizer=manifest.tokenizer,
            validation_fraction=manifest.validation_fraction,
            seed=data.seed,
            seq_len=data.seq_len,
            batch_size=data.batch_size,
            process_count=process_count,
            streams=data.streams,
            shuffle_buffer=data.shuffle_buffer,
        )


@dataclass(frozen=True)
class CacheFile(File):
    """One file of a cache, which continues the rows of the same process's previous file, one record per row.

    Attributes:
        process: index of the process whose part of each batch the rows belong to.
        rows: number of records.
        largest: maximum number of entries per token.
    """

    process: int
    rows: int
    largest: int


@dataclass(frozen=True)
class CacheManifest:
    """The content of a cache folder, as in its manifest.json.

    Attributes:
        format: version of the folder's format.
        order: data that it was made for, and the order of its rows.
        teacher: `source_identity` of the teacher.
        teacher_path: path that the teacher was read from.
        dtype: dtype of the teacher's weights and activations.
        num_tokens: number of tokens of the teacher's vocabulary, without padding.
        encoding: encoding of the distributions.
        grid: grid of the stored logarithms.
        files: files in order; for each chunk of rows, one file per process.
    """

    format: int
    order: DataOrder
    teacher: str
    teacher_path: str
    dtype: str
    num_tokens: int
    encoding: EncodingConfig
    grid: LogGrid
    files: tuple[CacheFile, ...]

    @property
    def rows(self) -> int:
        """Number of rows, over all processes."""
        return sum(file.rows for file in self.files)

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)

    @property
    def bytes_per_token(self) -> float:
        """Average size per token; the cache must have rows."""
        return self.size / (self.rows * self.order.seq_len)

    @property
    def largest(self) -> int:
        """K, the maximum number of entries per token."""
        return max((file.largest for file in self.files), default=0)


_ADAPTER = TypeAdapter(CacheManifest)


def write_cache_manifest(folder: Path, manifest: CacheManifest) -> None:
    """Replaces the folder's manifest."""
    write_text(folder / MANIFEST, _ADAPTER.dump_json(manifest, indent=1).decode() + "\n")


def find_cache(folder: str | Path) -> CacheManifest | None:
    """Reads the folder's manifest; returns None if it has none.

    Raises:
        UserError: it cannot be read or has another format, or files that it lists are missing or truncated.
    """
    expected = "the manifest of a teacher's cache; choose another distill.cache"
    manifest = read_described("distill.cache", folder, _ADAPTER, FORMAT, expected, "make")
    if manifest is not None:
        for file in manifest.files:
            check_size(Path(folder), file, "make")
    return manifest


def read_cache(folder: str | Path) -> CacheManifest:
    """Reads the folder's manifest.

    Raises:
        UserError: the folder has no manifest; or as `find_cache`.
    """
    manifest = find_cache(folder)
    if manifest is None:
        raise UserError(
            f"distill.cache {folder} holds no teacher's cache; run `gemma2 teacher-cache` with the student's "
            "configuration to make it."
        )
    return manifest


def verify_cache(folder: str | Path) -> int:
    """Verifies the checksum of every file of a cache, and returns the number of files.

    Raises:
        UserError: a file, which the message names, has changed since it was written; or as `read_cache`.
    """
    manifest = read_cache(folder)
    for file in manifest.files:
        check_content(Path(folder), file, "make")
    return len(manifest.files)


def refuse_other_order(folder: str | Path, manifest: CacheManifest, order: DataOrder) -> None:
    """Raises UserError if a cache was made for other rows than those of `order`."""
    names = {
        "documents": "set of documents in data.folder",
        "tokenizer": "tokenizer",
        "process_count": "number of processes",
    }
    for field in fields(DataOrder):
        was, wanted = getattr(manifest.order, field.name), getattr(order, field.name)
        if was != wanted:
            key = names.get(field.name, f"data.{field.name}")
            if field.name in ("documents", "tokenizer"):
                was, wanted = was[:12], wanted[:12]
            raise _other(folder, key, was, wanted)


def refuse_other_teacher(folder: str | Path, manifest: CacheManifest, identity: str, path: str) -> None:
    """Raises UserError if a cache was made from another teacher than the one at `path`."""
    if manifest.teacher != identity:
        was = f"{manifest.teacher_path}, weights {manifest.teacher[:12]}"
        raise _other(folder, "distill.teacher", was, f"{path}, weights {identity[:12]}")


def refuse_other_dtype(folder: str | Path, manifest: CacheManifest, dtype: str) -> None:
    """Raises UserError if a cache was computed in another dtype."""
    if manifest.dtype != dtype:
        raise _other(folder, "distill.dtype", manifest.dtype, dtype)


def refuse_other_encoding(folder: str | Path, manifest: CacheManifest, encoding: EncodingConfig) -> None:
    """Raises UserError if a cache was made with other settings."""
    was, wanted = to_dict(manifest.encoding), to_dict(encoding)
    for key in wanted:
        if was[key] != wanted[key]:
            raise _other(folder, f"distill.encoding.{key}", was[key], wanted[key])


def _other(folder: str | Path, key: str, was: object, wanted: object) -> UserError:
    is_key = key.startswith(("data.", "distill.")) and key != "distill.teacher"
    typed = as_override(key, was) if is_key else None
    remedy = "" if typed is None else f"write {typed} to use it, or "
    return UserError(
        f"distill.cache {folder} was made with a different {key} ({written(was)}, now {written(wanted)}); {remedy}set "
        "distill.cache to another folder and run `gemma2 teacher-cache`."
    )
