"""Checks that a checkpoint is intact, by a manifest with the size and checksum of each of its files.

    RUN/checkpoints/<step>/manifest.json   {"format": 1, "files": {"params/d/0a": {"size": 4096, "crc32": "89abcdef"}}}

The manifest is written before Orbax gives a finished checkpoint its final name, so that both appear at once. A
checkpoint counts as intact if every file in its manifest exists with its size, which can be checked without reading the
files. Checksums (zlib.crc32, some 4 GB/s per core) are compared when a checkpoint is read. They detect accidental
damage by disks and copies, not deliberate changes.

Older checkpoints have no manifest. They count as intact if the files that Orbax reads first exist and no file is empty.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma2_jax.files import write_text
from gemma2_jax.machine import cores

MANIFEST = "manifest.json"
ANNOUNCED = {"manifest": MANIFEST}  # in the metadata of a checkpoint that was written with a manifest
METADATA = (
    "_CHECKPOINT_METADATA"  # Orbax's, of the whole checkpoint; rewritten when the checkpoint is renamed
)
_FORMAT = 1
_CHUNK = 1 << 22  # bytes read at a time
_FIRST_READ = ("_METADATA", "manifest.ocdbt")  # the files that Orbax reads first in a tree of arrays


def write_checkpoint_manifest(checkpoint: Path) -> None:
    """Writes the manifest of all files in the folders of a checkpoint whose trees are finished."""
    names = [
        path.relative_to(checkpoint).as_posix()
        for folder in sorted(checkpoint.iterdir())
        if folder.is_dir()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    with ThreadPoolExecutor(cores()) as pool:
        sums = list(pool.map(lambda name: _checksum(checkpoint / name), names))
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "crc32": found}
        for name, found in zip(names, sums, strict=True)
    }
    write_text(checkpoint / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")


def missing(checkpoint: Path, tree: str | None = None) -> str | None:
    """Returns what a checkpoint or one of its trees lacks ("params/d/0a1b is missing"); None if it is intact.

    Reads the manifest, but only the sizes of the other files.
    """
    files = _manifest(checkpoint, tree)
    if isinstance(files, str):
        return files
    if files is None:
        return _missing_without_manifest(checkpoint, tree)
    for name, known in files.items():
        wrong = _wrong_size(checkpoint / name, known["size"])
        if wrong:
            return f"{name} {wrong}"
    return None


def changed(checkpoint: Path, tree: str | None = None, share: int = 0, shares: int = 1) -> str | None:
    """Returns which file of a checkpoint or of one of its trees has changed since it was written; None if none has.

    Reads every `shares`-th file, starting with number `share`. Returns None for a checkpoint without a manifest.
    """
    files = _manifest(checkpoint, tree)
    if files is None or isinstance(files, str):
        return files
    own = sorted(files)[share::shares]
    with ThreadPoolExecutor(cores()) as pool:
        for name, found in zip(
            own, pool.map(lambda name: _try_checksum(checkpoint / name), own), strict=True
        ):
            if found != files[name]["crc32"]:
                return f"{name} has changed since it was written"
    return None


def _manifest(checkpoint: Path, tree: str | None) -> dict[str, Any] | str | None:
    """Returns a tree's files in the manifest, or what is wrong with the manifest; None for older checkpoints."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{MANIFEST} is missing" if _had_manifest(checkpoint) else None
    except (OSError, UnicodeDecodeError):
        return f"{MANIFEST} cannot be read"
    if not text.strip():
        return f"{MANIFEST} is empty"
    try:
        manifest = json.loads(text)
        files = {
            name: {"size": int(known["size"]), "crc32": str(known["crc32"])}
            for name, known in manifest["files"].items()
            if tree is None or name.startswith(f"{tree}/")
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is truncated or damaged"
    if manifest.get("format") != _FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')}, but this version reads format {_FORMAT}"
    return files or f"{MANIFEST} lists no file{'' if tree is None else f' of {tree}'}"


def _had_manifest(checkpoint: Path) -> bool:
    """Whether a checkpoint was written with a manifest, according to its metadata."""
    found = _orbax_metadata(checkpoint).get("custom_metadata")
    return isinstance(found, dict) and found.get("manifest") == MANIFEST


def _orbax_metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns Orbax's metadata of the whole checkpoint; empty if its file is missing or damaged."""
    try:
        found = json.loads((checkpoint / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _missing_without_manifest(checkpoint: Path, tree: str | None) -> str | None:
    """Like `missing`, for a checkpoint that was written without a manifest or a tree that was copied alone."""
    trees = [tree] if tree is not None else list(_orbax_metadata(checkpoint).get("item_handlers") or ())
    if not trees:
        return f"{METADATA} is missing, truncated or empty"
    for name in trees:
        folder = checkpoint / name
        # The iterator's state has one file per process and none of these files.
        needed = _FIRST_READ if (folder / _FIRST_READ[0]).exists() or not list(_files(folder)) else ()
        for file in (*(folder / each for each in needed), *_files(folder)):
            wrong = _wrong_size(file, None)
            if wrong:
                return f"{file.relative_to(checkpoint).as_posix()} {wrong}"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _wrong_size(file: Path, size: int | None) -> str | None:
    """Returns what is wrong with a file that should have `size` bytes, or any with None; None if nothing is."""
    try:
        found = file.stat().st_size
    except OSError:
        return "is missing"
    if found == size or (size is None and found):
        return None
    if not found:
        return "is empty"
    return f"has {found:,} bytes of {size:,}"


def _try_checksum(file: Path) -> str:
    try:
        return _checksum(file)
    except OSError as error:
        return str(error)


def _checksum(file: Path) -> str:
    """Returns the CRC-32 of a file in hexadecimal, reading it in chunks."""
    value, buffer = 0, bytearray(_CHUNK)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"
