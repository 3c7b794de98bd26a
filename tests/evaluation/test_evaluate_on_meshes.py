"""Evaluations on eight devices; those of test_evaluate_text.py have one."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.evaluate import evaluate
from gemma2_jax.sharding.mesh import MeshConfig


@pytest.fixture
def text(texts: list[str], tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(texts[:8])[:2000])
    return str(tmp_path / "text.txt")


def test_a_batch_that_the_mesh_does_not_divide_is_refused(student: str, text: str) -> None:
    with pytest.raises(UserError, match="batch is 3 rows, which"):
        evaluate(student, EvaluationConfig(text=[text], batch=3))


@pytest.mark.thorough
def test_any_mesh_gives_the_scores_of_one_device(
    student: str, teacher: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluationConfig(
        text=[text], context=24, teacher=teacher, batch=8, memorisation=2, mesh=MeshConfig(2, 2, 2)
    )
    sharded = evaluate(student, config).rows[0]
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    single = evaluate(student, replace(config, mesh=MeshConfig())).rows[0]
    assert sharded.memorisation == single.memorisation
    for name in ("nats", "kl", "acceptance", "entropy", "confidence_difference", "bits_per_byte"):
        expected = getattr(single.scores["document"].total, name)
        assert getattr(sharded.scores["document"].total, name) == pytest.approx(expected, rel=1e-4)
