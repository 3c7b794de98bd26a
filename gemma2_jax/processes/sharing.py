"""What the processes of a job share on disk: folders that process 0 makes, and files that all of them read."""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from gemma2_jax.config import UserError
from gemma2_jax.files import LOCK, reason
from gemma2_jax.machine import cores
from gemma2_jax.processes.hosts import check_agreement, from_all, from_first, is_first, wait_for_all


def check_shared(folders: Iterable[tuple[str, str]]) -> None:
    """Checks in all processes that they see the folders that process 0 has made, and whose locks it holds.

    Args:
        folders: setting and path of each folder.

    Raises:
        UserError: a folder is missing for this process, or is a different one of the same name.
    """
    if jax.process_count() == 1:
        return
    folders, mark = list(folders), secrets.token_hex(8)
    if is_first():
        for _, folder in folders:
            (Path(folder) / LOCK).write_text(mark)
    mark = from_first(mark)
    for key, folder in folders:
        try:
            found = (Path(folder) / LOCK).read_text()
        except OSError:
            found = ""
        if found != mark:
            raise UserError(
                f"{key} is {folder}, but process {jax.process_index()} finds a different folder there "
                f"({Path(folder).absolute()}) than process 0; it must be on a disk that all processes share."
            )
    wait_for_all("shared")  # before anything is written there, while process 0 can still undo it


def check_same_files(files: Mapping[str, Sequence[Path]]) -> None:
    """Raises UserError in a process whose files differ from those of process 0, which would change the result.

    Files on a shared disk are compared by size, modification time and inode. If these differ, all processes compare
    contents.

    Args:
        files: files by name of what they hold, for the message; the same names in all processes.
    """
    if jax.process_count() == 1:
        return
    own = {name: _of_disk(paths) for name, paths in files.items()}
    first = from_first(own)
    apart = {
        name for names in from_all([name for name in own if own[name] != first.get(name)]) for name in names
    }
    check_agreement({f"the content of {name}": _of_content(files[name]) for name in own if name in apart})


def _of_disk(paths: Sequence[Path]) -> str:
    """A digest that is equal for the same files on one disk, however it is mounted."""
    found = [(path.name, path.stat()) for path in paths]
    states = [(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in found]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _of_content(paths: Sequence[Path]) -> str:
    with ThreadPoolExecutor(cores()) as pool:
        contents = list(pool.map(_sha256, paths))
    names = [path.name for path in paths]
    return hashlib.sha256(repr(list(zip(names, contents, strict=True))).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
