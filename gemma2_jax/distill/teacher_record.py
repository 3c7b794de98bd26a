"""teacher.json in a run folder, which identifies the teacher that the run is distilled from, whatever its path."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError, build, read_json, to_dict
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.files import write_text

TEACHER_FILE = "teacher.json"
FORMAT = 2  # version of the record; raised when the identity of the same teacher changes


@dataclass(frozen=True)
class TeacherRecord:
    """The identity of a teacher or of a teacher's cache.

    Attributes:
        identity: `weights_identity` of the teacher's weights in `dtype`, or of the checkpoint that the cache was made
            from.
        dtype: dtype of the teacher; None in older files.
        encoding: encoding of the cache; None without a cache, and in older files.
        format: version of the record.
    """

    identity: str
    dtype: str | None = None
    encoding: EncodingConfig | None = None
    format: int = FORMAT

    @property
    def is_comparable(self) -> bool:
        """Whether this version computes the identity in the same way; if not, teachers are compared by path."""
        return self.format == FORMAT

    def save(self, run_folder: Path) -> None:
        write_text(run_folder / TEACHER_FILE, json.dumps(to_dict(self)))


def read_teacher_record(run_folder: str | Path) -> TeacherRecord | None:
    """Reads the record in a run folder; None without a teacher, and in folders of older versions."""
    path = Path(run_folder) / TEACHER_FILE
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is truncated or damaged: it does not hold a JSON object.")
    return build(TeacherRecord, {"format": 1, **found}, str(path))  # Older files lack this key.


def check_same_teacher(run_folder: str, distill: DistillConfig, now: TeacherRecord) -> None:
    """Raises UserError if the run in the folder was distilled from another teacher than `now`, the configured one."""
    begun = read_teacher_record(run_folder)
    if begun is None:
        return
    named = (
        f"distill.teacher {distill.teacher}" if distill.cache is None else f"distill.cache {distill.cache}"
    )
    remedy = "choose another output, or delete that folder to train again."
    found = _settings(now)
    for key, value in _settings(begun).items():
        if found.get(key) != value:
            source = "teacher" if begun.encoding is None else "cache"
            raise UserError(
                f"{run_folder} was distilled from a {source} with {key}={value} ({TEACHER_FILE}), but {named} "
                f"has {found.get(key)}; {remedy}"
            )
    if begun.is_comparable and begun.identity != now.identity:
        raise UserError(
            f"{run_folder} was distilled from other weights ({begun.identity[:12]}, {TEACHER_FILE}) than those of "
            f"{named} ({now.identity[:12]}); {remedy}"
        )


def _settings(record: TeacherRecord) -> dict[str, Any]:
    """The recorded settings that the teacher's outputs depend on, by their keys in the configuration."""
    encoding = {} if record.encoding is None else to_dict(record.encoding)
    dtype = {} if record.dtype is None else {"distill.dtype": record.dtype}
    return {f"distill.encoding.{name}": value for name, value in encoding.items()} | dtype
