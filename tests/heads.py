"""A student and its training signal, under the names that the objective's token loss uses."""

from dataclasses import replace
from typing import Any

import jax

from gemma2_jax.kernels.lm_head import LMHead


def student_and_teacher(
    student: LMHead, teacher: Any, targets: jax.Array
) -> tuple[dict[str, LMHead], dict[str, Any]]:
    """Heads and per-token arrays. The teacher is an LM head, sparse targets or None."""
    if isinstance(teacher, LMHead):
        return {"model": student, "teacher": replace(teacher, trained=False)}, {"targets": targets}
    if teacher is None:
        return {"model": student}, {"targets": targets}
    return {"model": student}, {"targets": targets, "teacher_targets": teacher}
