"""A run folder's record of its teacher: kept, and compared with the teacher of today."""

import json
from pathlib import Path

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.distill.teacher_record import (
    TEACHER_FILE,
    TeacherRecord,
    check_same_teacher,
    read_teacher_record,
)

DISTILL = DistillConfig("runs/teacher", "bfloat16")
RECORD = TeacherRecord("a" * 64, "bfloat16")
OF_CACHE = TeacherRecord("a" * 64, "bfloat16", EncodingConfig())


@pytest.mark.parametrize("record", [RECORD, OF_CACHE])
def test_a_record_is_read_as_it_was_saved(tmp_path: Path, record: TeacherRecord) -> None:
    record.save(tmp_path)
    assert read_teacher_record(tmp_path) == record
    assert record.is_comparable
    check_same_teacher(str(tmp_path), DISTILL, record)


@pytest.mark.parametrize(
    ("begun", "now", "sentence"),
    [
        (
            RECORD,
            TeacherRecord("b" * 64, "bfloat16"),
            r"from other weights \(aaaaaaaaaaaa, .*\(bbbbbbbbbbbb\)",
        ),
        # Rounded otherwise, the weights differ too; the dtype says why.
        (
            RECORD,
            TeacherRecord("b" * 64, "float32"),
            r"from a teacher with distill\.dtype=bfloat16 .* has float32",
        ),
        (
            OF_CACHE,
            TeacherRecord("a" * 64, "bfloat16", EncodingConfig(weight_bits=8)),
            r"from a cache with distill\.encoding\.weight_bits=12 .* has 8",
        ),
        (OF_CACHE, RECORD, r"from a cache with distill\.encoding\.kind=sampled .* has None"),
    ],
)
def test_another_teacher_is_refused(
    tmp_path: Path, begun: TeacherRecord, now: TeacherRecord, sentence: str
) -> None:
    begun.save(tmp_path)
    with pytest.raises(UserError, match=rf"was distilled {sentence}.*; choose another output, or delete"):
        check_same_teacher(str(tmp_path), DISTILL, now)


def test_an_older_record_is_of_another_digest(tmp_path: Path) -> None:
    (tmp_path / TEACHER_FILE).write_text(json.dumps({"identity": "0" * 64, "encoding": None, "dtype": None}))
    found = read_teacher_record(tmp_path)
    assert found is not None
    assert not found.is_comparable
    check_same_teacher(str(tmp_path), DISTILL, RECORD)
