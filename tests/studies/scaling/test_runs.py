"""Run folders as points of a fit, and which are refused."""

import shutil

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.studies.scaling.runs import collect_runs


def test_a_run_is_a_point(runs):
    folder = runs.write("one", width=64, steps=300, loss=2.5)
    (found,) = collect_runs([str(folder)], embedding=True).runs
    assert (found.parameters, found.tokens) == (runs.parameters(64), runs.tokens(300))
    assert (found.loss, found.targets, found.teacher) == (2.5, 5000, None)
    (without,) = collect_runs([str(folder)], embedding=False).runs
    assert without.parameters == runs.parameters(64, embedding=False) < found.parameters


def test_folders_of_runs_are_searched_and_each_run_counts_once(runs):
    one, two = runs.write("sweep/a"), runs.write("sweep/deep/b", steps=300)
    found = collect_runs([str(runs.folder / "sweep"), str(one)], embedding=True)
    assert [run.folder for run in found.runs] == [str(one), str(two)]


def test_runs_that_are_no_points_are_left_out(runs):
    runs.write("done")
    runs.write("stopped", steps=300, done=40)
    runs.write("diverged", steps=1000, loss=float("inf"))
    tuned = runs.write("tuned")
    text = (tuned / "config.yaml").read_text()
    assert "source: null" in text
    (tuned / "config.yaml").write_text(text.replace("  source: null", "  source: runs/base"))
    found = collect_runs([str(runs.folder)], embedding=True)
    assert [run.folder for run in found.runs] == [str(runs.folder / "done")]
    assert found.left_out == {
        str(runs.folder / "stopped"): "it is not finished (step 40 of 300)",
        str(runs.folder / "diverged"): "its validation cross-entropy is inf",
        str(tuned): "it started from the weights of runs/base",
    }
    shutil.rmtree(runs.folder / "done")
    with pytest.raises(UserError, match=r"(?s)no run can be used for a fit:\n.*stopped: it is not finished"):
        collect_runs([str(runs.folder)], embedding=True)


def test_the_teacher_of_a_run(runs):
    teacher = runs.write("teacher", width=256, steps=3000, loss=2.0)
    student = runs.write("student", teacher=str(teacher))
    found = collect_runs([str(student)], embedding=True).runs[0].teacher
    assert found is not None
    assert (found.path, found.loss) == (str(teacher), 2.0)
    assert (found.parameters, found.tokens) == (runs.parameters(256), runs.tokens(3000))


def test_the_teacher_of_a_study_that_was_moved(runs):
    runs.write("teacher", loss=2.0)
    student = runs.write("student", teacher="elsewhere/teacher")
    found = collect_runs([str(student)], embedding=True).runs[0].teacher
    assert found is not None
    assert found.loss == 2.0


def test_a_teacher_that_is_no_run(runs):
    student = runs.write("student", teacher="google/gemma-2-9b")
    with pytest.raises(
        UserError, match=r"is google/gemma-2-9b, which is not a run folder.*--teacher-loss 2.31"
    ):
        collect_runs([str(student)], embedding=True)
    found = collect_runs([str(student)], embedding=True, teacher_loss=1.9).runs[0].teacher
    assert found is not None
    assert (found.loss, found.parameters) == (1.9, None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [("documents", "on other documents than"), ("tokenizer", "with another tokenizer than")],
)
def test_mixed_data_is_refused(runs, changed, words):
    runs.write("a")
    runs.write("b", **{changed: "other"})
    with pytest.raises(UserError, match=rf"b was trained {words} .*a \(data.json\)"):
        collect_runs([str(runs.folder)], embedding=True)


def test_a_teacher_of_other_data_is_refused(runs):
    teacher = runs.write("teacher", documents="other")
    student = runs.write("student", teacher=str(teacher))
    with pytest.raises(UserError, match="teacher was trained on other documents than"):
        collect_runs([str(student)], embedding=True)


def test_what_is_no_run_is_refused(runs):
    folder = runs.write("a")
    with pytest.raises(UserError, match="nowhere is not a folder; give run folders"):
        collect_runs(["nowhere"], embedding=True)
    empty = runs.folder / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty holds no run: there is no folder with config"):
        collect_runs([str(empty)], embedding=True)
    (folder / "data.json").unlink()
    with pytest.raises(UserError, match=r"data.json is missing"):
        collect_runs([str(folder), str(runs.write("b"))], embedding=True)
