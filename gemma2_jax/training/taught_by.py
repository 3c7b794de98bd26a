"""Who taught a run: teacher.json in its folder, by which a run that goes on knows its teacher wherever it lies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError, build, read_json, to_dict
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.files import write_text
from gemma2_jax.training.config import RunConfig

TEACHER_FILE = "teacher.json"


@dataclass(frozen=True)
class TaughtBy:
    """What tells one who teaches from another.

    Attributes:
        identity: the teacher's fingerprint, or that of the checkpoint which a cache was made of.
        encoding, dtype: what the cache holds that stands in for the teacher; None without a cache, and in files of
            before they were there.
    """

    identity: str
    encoding: EncodingConfig | None = None
    dtype: str | None = None

    def save(self, run_folder: Path) -> None:
        write_text(run_folder / TEACHER_FILE, json.dumps(to_dict(self)))


def read_taught_by(run_folder: str | Path) -> TaughtBy | None:
    """Who taught the run in a folder; None without a teacher, and in folders of before it was written."""
    path = Path(run_folder) / TEACHER_FILE
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is cut or broken: it holds no keys and values.")
    return build(TaughtBy, found, str(path))


def check_same_teacher(config: RunConfig, now: TaughtBy | None) -> None:
    """Raises UserError if the run was taught by another than the one of `Inputs.taught_by`."""
    begun = read_taught_by(config.output)
    if now is None or begun is None:
        return
    cache, teacher = config.distill.cache, config.distill.teacher
    named = f"distill.teacher {teacher}" if cache is None else f"distill.cache {cache}"
    remedy = "choose another output, or delete that folder to train again."
    if begun.identity != now.identity:
        raise UserError(
            f"{config.output} was taught by other weights ({begun.identity[:12]}, {TEACHER_FILE}) than those of "
            f"{named} ({now.identity[:12]}); {remedy}"
        )
    if begun.encoding is None:
        return
    found = _of_cache(now)
    for key, value in _of_cache(begun).items():
        if found.get(key) != value:
            raise UserError(
                f"{config.output} was taught by a cache with {key}={value} ({TEACHER_FILE}), and that of {named} has "
                f"{found.get(key)}; {remedy}"
            )


def _of_cache(taught_by: TaughtBy) -> dict[str, Any]:
    """What a cache holds, by the keys of the configuration."""
    encoding = {} if taught_by.encoding is None else to_dict(taught_by.encoding)
    return {f"distill.encoding.{name}": value for name, value in encoding.items()} | {
        "distill.dtype": taught_by.dtype
    }
