"""Which teacher a run is distilled from: teacher.json in its folder, which identifies the teacher wherever it lies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError, build, read_json, to_dict
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.files import write_text

TEACHER_FILE = "teacher.json"
FORMAT = 2  # of the record; raised when the same teacher would get another identity


@dataclass(frozen=True)
class TeacherRecord:
    """What distinguishes one teacher from another.

    Attributes:
        identity: `teacher_identity` of the teacher's weights in `dtype`, or of the checkpoint that a cache was made of.
        dtype: that the teacher is computed in; None in older files.
        encoding: of the cache that stands in for the teacher; None without a cache, and in older files.
        format: of the record.
    """

    identity: str
    dtype: str | None = None
    encoding: EncodingConfig | None = None
    format: int = FORMAT

    @property
    def is_comparable(self) -> bool:
        """Whether the same teacher has this identity today; else the run keeps to the path of its teacher."""
        return self.format == FORMAT

    def save(self, run_folder: Path) -> None:
        write_text(run_folder / TEACHER_FILE, json.dumps(to_dict(self)))


def read_teacher_record(run_folder: str | Path) -> TeacherRecord | None:
    """The record in a run folder; None without a teacher, and in folders of older versions."""
    path = Path(run_folder) / TEACHER_FILE
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is cut or broken: it holds no keys and values.")
    return build(TeacherRecord, {"format": 1, **found}, str(path))  # Older files lack this key.


def check_same_teacher(run_folder: str, distill: DistillConfig, now: TeacherRecord | None) -> None:
    """Raises UserError if the run in the folder was distilled from another teacher than `now`, the one configured."""
    begun = read_teacher_record(run_folder)
    if now is None or begun is None:
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
                f"{run_folder} was distilled from a {source} with {key}={value} ({TEACHER_FILE}), and that of "
                f"{named} has {found.get(key)}; {remedy}"
            )
    if begun.is_comparable and begun.identity != now.identity:
        raise UserError(
            f"{run_folder} was distilled from other weights ({begun.identity[:12]}, {TEACHER_FILE}) than those of "
            f"{named} ({now.identity[:12]}); {remedy}"
        )


def _settings(record: TeacherRecord) -> dict[str, Any]:
    """What the outputs depend on beside the weights, by the keys of the configuration, as far as it is recorded."""
    encoding = {} if record.encoding is None else to_dict(record.encoding)
    dtype = {} if record.dtype is None else {"distill.dtype": record.dtype}
    return {f"distill.encoding.{name}": value for name, value in encoding.items()} | dtype
