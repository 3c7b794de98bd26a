"""What a folder of cached teacher signals holds, and which data, teacher and settings it was made for."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter

from gemma2_jax.config import UserError, as_override, to_dict
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.shards import MANIFEST, File, check_content, check_size, read_described, read_manifest
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.packing import LogGrid
from gemma2_jax.files import write_text

FORMAT = 2  # of the folder; raised when a reader of the old one would misread the new one


@dataclass(frozen=True)
class DataOrder:
    """All that decides which tokens are in row i of the training data, and in which file it is.

    Attributes:
        documents: the prepared data's identity; tokenizer: fingerprint of its tokenizer.
        process_count: the processes that each batch's rows are divided among.
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
        manifest = read_manifest(data.folder)
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
    """One file: record i is row i of what `process` is fed, counted on from that process's file before.

    Attributes:
        rows: how many records.
        largest: the most entries that a token has.
    """

    process: int
    rows: int
    largest: int


@dataclass(frozen=True)
class Manifest:
    """What the folder holds; its manifest.json.

    Attributes:
        format: version of the folder's layout.
        order: the data that it was made for.
        teacher: `teacher_identity`; teacher_path: where it lay; dtype: that it was computed in.
        num_tokens: V.
        encoding: how its distributions were made sparse.
        grid: of the logarithms.
        files: in order, those of all processes for a stretch of rows before the next stretch.
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
        """How many rows there are, over all processes."""
        return sum(file.rows for file in self.files)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files)

    @property
    def bytes_per_token(self) -> float:
        """Of a cache that has rows."""
        return self.size / (self.rows * self.order.seq_len)

    @property
    def largest(self) -> int:
        """K, the most entries that a token has."""
        return max((file.largest for file in self.files), default=0)


_ADAPTER = TypeAdapter(Manifest)


def write_cache_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts `manifest` in the place of the folder's manifest."""
    write_text(folder / MANIFEST, _ADAPTER.dump_json(manifest, indent=1).decode() + "\n")


def find_cache(folder: str | Path) -> Manifest | None:
    """The folder's manifest, None if it has none.

    Raises:
        UserError: it cannot be read, is of another format, or files that it names are gone or cut.
    """
    expected = "the manifest of a teacher's cache; choose another distill.cache"
    manifest = read_described("distill.cache", folder, _ADAPTER, FORMAT, expected, "make")
    if manifest is not None:
        for file in manifest.files:
            check_size(Path(folder), file, "make")
    return manifest


def read_cache(folder: str | Path) -> Manifest:
    """As `find_cache`. Raises UserError if there is none, too."""
    manifest = find_cache(folder)
    if manifest is None:
        raise UserError(
            f"distill.cache {folder} holds no teacher's cache; make it by `gemma2 teacher-cache` with the "
            "student's configuration."
        )
    return manifest


def verify_cache(folder: str | Path) -> int:
    """Reads every file of a cache, and returns how many there are.

    Raises:
        UserError: a file, which is named, is not as it was written; or as `read_cache`.
    """
    manifest = read_cache(folder)
    for file in manifest.files:
        check_content(Path(folder), file, "make")
    return len(manifest.files)


def refuse_other_order(folder: str | Path, manifest: Manifest, order: DataOrder) -> None:
    """Raises UserError if the rows of `order` are not those that a cache was made for."""
    names = {
        "documents": "the documents of data.folder",
        "tokenizer": "the tokenizer",
        "process_count": "the number of processes",
    }
    for field in fields(DataOrder):
        was, wanted = getattr(manifest.order, field.name), getattr(order, field.name)
        if was != wanted:
            key = names.get(field.name, f"data.{field.name}")
            if field.name in ("documents", "tokenizer"):
                was, wanted = was[:12], wanted[:12]
            raise _other(folder, key, was, wanted)


def refuse_other_teacher(folder: str | Path, manifest: Manifest, identity: str, path: str) -> None:
    """Raises UserError if a cache was made of another teacher than the one at `path`."""
    if manifest.teacher != identity:
        was = f"{manifest.teacher_path}, weights {manifest.teacher[:12]}"
        raise _other(folder, "distill.teacher", was, f"{path}, weights {identity[:12]}")


def refuse_other_dtype(folder: str | Path, manifest: Manifest, dtype: str) -> None:
    """Raises UserError if a cache was computed in another dtype."""
    if manifest.dtype != dtype:
        raise _other(folder, "distill.dtype", manifest.dtype, dtype)


def refuse_other_encoding(folder: str | Path, manifest: Manifest, encoding: EncodingConfig) -> None:
    """Raises UserError if a cache was made with other settings."""
    was, wanted = to_dict(manifest.encoding), to_dict(encoding)
    for key in wanted:
        if was[key] != wanted[key]:
            raise _other(folder, f"distill.encoding.{key}", was[key], wanted[key])


def _other(folder: str | Path, key: str, was: object, wanted: object) -> UserError:
    typed = as_override(key, was) if re.fullmatch(r"[a-z_.]+", key) and key != "distill.teacher" else None
    remedy = "" if typed is None else f"write {typed} to use it, or "
    return UserError(
        f"distill.cache {folder} was made with another value of {key} ({was}, now {wanted}); {remedy}set distill.cache "
        "to another folder and run `gemma2 teacher-cache`."
    )
