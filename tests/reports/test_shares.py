"""The gains of students, with known numbers."""

from pathlib import Path

import pytest

from gemma2_jax.reports.collect import collect
from gemma2_jax.reports.groups import grouped_runs
from gemma2_jax.reports.intervals import SeedInterval, seed_interval
from gemma2_jax.reports.shares import Share, gap_shares
from tests.reports.conftest import WriteRun

ONLINE = {"distill.teacher": "t/teacher"}


def by_student(found: list[Share]) -> dict[str, Share]:
    return {share.student: share for share in found}


def test_seeds_are_grouped_and_other_settings_are_not(study: Path) -> None:
    found = {each.name: len(each.runs) for each in grouped_runs(collect([study]).runs)}
    assert found == {"teacher": 1, "scratch": 3, "online": 3, "cached": 3}


def test_each_seed_is_compared_with_its_own_scratch_and_online_run(study: Path) -> None:
    found = by_student(gap_shares(collect([study]).runs))
    assert set(found) == {"online", "cached"}
    online, cached = found["online"], found["cached"]
    assert (online.scratch, online.teacher, online.full, online.kept) == ("scratch", "teacher", None, None)
    assert online.closed is not None
    assert cached.closed is not None
    assert cached.kept is not None
    each = [1.0 / 2.0, 1.05 / 2.1, 0.95 / 1.9]
    assert online.closed.mean == pytest.approx(sum(each) / 3)
    kept = [0.5 / 1.0, 0.51 / 1.05, 0.49 / 0.95]
    assert cached.full == "online"
    assert cached.kept.mean == pytest.approx(sum(kept) / 3)
    assert cached.kept == seed_interval(kept) or cached.kept.low == pytest.approx(seed_interval(kept).low)
    assert cached.kept.kind == "95 % t interval over 3 seeds"


def test_the_interval_over_seeds() -> None:
    assert seed_interval([0.5]) == SeedInterval(0.5, None, None, "", 1)
    assert seed_interval([0.4, 0.6]) == SeedInterval(0.5, 0.4, 0.6, "minimum to maximum of 2 seeds", 2)
    found = seed_interval([1.0, 2.0, 3.0])
    # The standard error is 1 / sqrt(3), and t with 2 degrees of freedom is 4.303.
    assert [found.low, found.high] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])
    assert seed_interval([0.0, 1.0] * 40).high == pytest.approx(0.5 + 1.96 * 0.5032 / 80**0.5, rel=1e-3)


@pytest.mark.parametrize("change", [{"model.d_ff": 128}, {"data.batch_size": 8}, {"training.steps": 30}])
def test_a_student_is_not_compared_with_scratch_of_other_sizes_or_tokens(
    write_run: WriteRun, change: dict
) -> None:
    folders = [
        write_run("t/teacher", 2.0, {"model.d_model": 64}),
        write_run("t/scratch", 4.0, change),
        write_run("t/student", 3.0, ONLINE),
    ]
    assert gap_shares(collect(folders).runs) == []


def test_of_several_runs_from_scratch_the_best_counts(write_run: WriteRun) -> None:
    folders = [
        write_run("t/teacher", 2.0, {"model.d_model": 64}),
        write_run("t/scratch", 4.0),
        write_run("t/tuned", 3.5, {"optimizer.learning_rate": 0.5}),
        write_run("t/student", 3.0, ONLINE),
    ]
    (share,) = gap_shares(collect(folders).runs)
    assert share.scratch == "tuned"
    assert share.closed == SeedInterval(pytest.approx(0.5 / 1.5), None, None, "", 1)  # type: ignore[arg-type]


def test_a_teacher_of_the_students_sizes_is_no_run_from_scratch(write_run: WriteRun) -> None:
    assert gap_shares(collect([write_run("t/teacher", 2.0), write_run("t/student", 3.0, ONLINE)]).runs) == []


def test_without_a_gap_there_is_no_share(write_run: WriteRun) -> None:
    folders = [write_run("t/teacher", 5.0, {"model.d_model": 64}), write_run("t/scratch", 4.0)]
    assert gap_shares(collect([*folders, write_run("t/student", 3.0, ONLINE)]).runs) == []


def test_a_student_without_its_teacher_or_scratch_has_no_share(write_run: WriteRun) -> None:
    assert gap_shares(collect([write_run("t/student", 3.0, ONLINE), write_run("t/scratch", 4.0)]).runs) == []
