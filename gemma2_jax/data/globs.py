"""Finds the files that the globs of `data.source` match, and the other matches, which cannot be read."""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.invalid import Invalid
from gemma2_jax.files import reason
from gemma2_jax.machine import is_installed

TEXT = (".txt", ".md", ".rst")
RECORDS = (".jsonl", ".parquet")
FORMATS = (*TEXT, *RECORDS)
COMPRESSIONS = (".gz", ".zst")

_WILD = re.compile(r"[*?[]")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class NothingMatchesError(UserError):
    """A pattern matches nothing."""


def kind_of(path: Path) -> str:
    """Returns the file's format as a suffix such as ".txt", without that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def printable(path: Path) -> str:
    """Returns a path as text that UTF-8 can encode; a file name may contain other bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def match_files(
    patterns: Iterable[str], formats: tuple[str, ...] = FORMATS
) -> tuple[list[Path], list[Invalid]]:
    """Returns the files that match any pattern, sorted by path, and the matches that cannot be read.

    `*`, `?`, `[…]` and `**` mean the same as in Python's glob. A name that exists literally is taken literally, so
    that `notes [old]/*.txt` finds its files. Folders are ignored, unless they are named like data files.

    Args:
        formats: the formats of files that can be read, as `kind_of` returns them.

    Raises:
        NothingMatchesError: a pattern matches nothing, or only folders.
        UserError: a folder or file on the way cannot be read, no match is a file of a known type, or the package
            that reads a matched file is not installed.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in _expand(pattern)]
        if all(_is_plain_folder(path) for path in matches):
            built_in = "python-docs, or " if formats == FORMATS else ""
            hint = (
                f" (it is a folder; write {pattern.rstrip('/')}/**/*{formats[0]} for its files)"
                if matches
                else ""
            )
            raise NothingMatchesError(
                f"data.source {pattern!r} matches no file{hint}; accepted: {built_in}globs of "
                f"{', '.join(formats)} files, each optionally .gz or .zst."
            )
        found.update(path for path in matches if not _is_plain_folder(path))
    files, invalid = [], []
    for path in sorted(found):
        problem = _problem(path, formats)
        if problem is None:
            files.append(path)
        else:
            invalid.append(problem)
    if not files:
        raise UserError(f"{invalid[0]}.")
    parquet = next((path for path in files if kind_of(path) == ".parquet"), None)
    if parquet is not None and not is_installed("pyarrow"):
        raise without_pyarrow(parquet)
    return files, invalid


def without_pyarrow(path: Path) -> UserError:
    """Returns the error for a file that needs pyarrow where it is not installed."""
    return UserError(f"{path} needs pyarrow: pip install 'gemma2_jax[parquet]'.")


def _problem(path: Path, formats: tuple[str, ...]) -> Invalid | None:
    """Returns why a match cannot be read as a data file; None if it can."""
    mode = _mode(path)
    if mode is None:
        detail = f"it links to {os.readlink(path)}" if path.is_symlink() else ""
        problem, hint = "a broken link", "fetch or restore that file, or remove the link"
        return Invalid(printable(path), problem, hint, detail)
    if stat.S_ISDIR(mode):
        return Invalid(
            printable(path), "a folder named like a file", f"write {path}/*{kind_of(path)} for its files"
        )
    if not stat.S_ISREG(mode):
        return Invalid(printable(path), "neither a file nor a folder", "remove it from data.source")
    if kind_of(path) not in formats:
        problem = "a text file" if kind_of(path) in TEXT else "a file of unknown type"
        accepted = f"accepted: {', '.join(formats)}, each optionally {' or '.join(COMPRESSIONS)}"
        return Invalid(printable(path), problem, accepted)
    return None


def _is_plain_folder(path: Path) -> bool:
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode) and kind_of(path) not in FORMATS


def _mode(path: Path) -> int | None:
    """Returns the mode bits of `path`, links followed; None if it does not exist or is a broken link."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None


def _expand(pattern: str) -> Iterator[str]:
    """Yields the paths that a pattern matches, including broken links; some may come twice."""
    path = Path(os.path.expanduser(pattern))
    names = path.parts[1:] if path.anchor else path.parts
    found = iter([path.anchor])
    for number, name in enumerate(names, 1):
        found = _matches_in(found, name, folders_only=number < len(names))
    return found


def _matches_in(folders: Iterable[str], name: str, folders_only: bool) -> Iterator[str]:
    # Python's own glob silently skips folders that cannot be read, and loops where a link points upwards.
    for folder in folders:
        if name == "**":
            yield from _below(folder, folders_only)
        elif _exists(os.path.join(folder, name)):
            yield os.path.join(folder, name)
        elif _WILD.search(name):
            for entry in _entries(folder, hidden=name.startswith(".")):
                if fnmatch.fnmatchcase(entry.name, name) and not (folders_only and not _is_folder(entry)):
                    yield os.path.join(folder, entry.name)


def _exists(path: str) -> bool:
    """Whether anything has this name, even a broken link."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    return True


def _below(folder: str, folders_only: bool, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields `folder` itself and everything in it at any depth; does not follow links to a folder above."""
    real = os.path.realpath(folder or ".")
    if real in above:
        return
    if folder:
        yield folder
    elif folders_only:
        yield ""
    for entry in _entries(folder, hidden=False):
        path = os.path.join(folder, entry.name)
        if _is_folder(entry):
            yield from _below(path, folders_only, (*above, real))
        elif not folders_only:
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _entries(folder: str, hidden: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return [entry for entry in entries if hidden or not entry.name.startswith(".")]
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise UserError(f"{folder} cannot be read: {reason(error, folder)}.") from None
