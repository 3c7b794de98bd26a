"""The command fit."""

import json

import pytest

from gemma2_jax.cli.main import main
from tests.studies.scaling.conftest import TRUE, Runs, runs, taught, true_student

__all__ = ["runs", "taught", "true_student"]  # fixtures of the fits themselves


def test_a_fit_is_printed_and_written(runs: Runs, capsys):
    runs.grid("run")
    runs.write("stopped", done=3)
    command = ["fit", str(runs.folder), "--bootstrap", "6", "--seed", "2", "--predict", "N=1e5,D=3e4"]
    assert main([*command, "--predict", "N=1e9,D=1e11", "--compute", "1e12"]) == 0
    printed = capsys.readouterr().out
    assert "16 runs; N counts the parameters with the embedding" in printed
    assert "left out:" in printed
    assert "stopped: it is not finished (step 3 of 100)" in printed
    assert "95% intervals of 6 sets of resampled runs (seed 2)" in printed
    assert "caution: the law is extrapolated where D or N is beyond the runs" in printed
    found = json.loads((runs.folder / "fit.json").read_text())
    assert (runs.folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    (law,) = found["laws"]
    for name, value in TRUE.items():
        assert law["parameters"][name]["value"] == pytest.approx(value, rel=0.02), name
    assert (found["resamples"], found["seed"], found["embedding_counted"]) == (6, 2, True)
    inside, outside = found["predictions"]
    assert outside["extrapolated"][0].startswith("N=1e+09 is beyond the runs (")
    assert inside["extrapolated"] == []
    assert inside["interval"] == pytest.approx([inside["loss"]] * 2, rel=1e-3)  # the losses have no noise
    (best,) = found["compute"]
    assert 6 * best["parameters"] * best["tokens"] == pytest.approx(1e12)
    assert len(found["runs"]) == 16
    assert all(run["fitted"] == pytest.approx(run["loss"], rel=1e-3) for run in found["runs"])


@pytest.mark.thorough
def test_a_fit_tells_where_a_teacher_pays(taught: Runs, tmp_path, capsys):
    command = ["fit", str(taught.folder), "--bootstrap", "3", "--output", str(tmp_path / "fit")]
    assert main([*command, "--predict", "N=1e5,D=1e5,T=2.9"]) == 0
    printed = capsys.readouterr().out
    assert "Does a teacher pay at equal FLOPs?" in printed
    assert "a teacher of loss 2.9" in printed
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert [len(law["parameters"]) for law in found["laws"]] == [5, 9]
    assert {each["cost"].split(", ")[1] for each in found["teacher_pays"]} >= {"the teacher exists"}
    students = [run for run in found["runs"] if run["teacher"] is not None]
    assert len(students) == 32
    assert all(run["fitted"] == pytest.approx(run["loss"], rel=0.02) for run in students)
    assert not (taught.folder / "fit.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--law", "chinchila"],
            "--law is chinchila, did you mean chinchilla (accepted: chinchilla, distillation).",
        ),
        (["--predict", "N=5"], "--predict is N=5; it needs both N and D, as in --predict N=5e6,D=1e8."),
        (["--predict", "N=5,D=6,M=2"], "--predict is N=5,D=6,M=2; accepted: N=…,D=… or N=…,D=…,T=…"),
        (["--predict", "N=5,N=6"], "--predict is N=5,N=6; accepted:"),
        (["--predict", "N=-5,D=6"], "N of --predict N=-5,D=6 is -5; accepted: a number above 0"),
        (["--compute", "much"], "--compute is much; accepted: a number above 0, as in 2.5e6."),
        (["--compute", "nan"], "--compute is nan; accepted: a number above 0"),
        (
            ["--bootstrap", "-1"],
            "--bootstrap is -1; accepted: a whole number, 0 or more, of at most 18 digits.",
        ),
        (["--seed", "x"], "--seed is x; accepted: a whole number, 0 or more, of at most 18 digits."),
        (["other"], "several PATHs are given, so the folder for the fit is not clear; add --output DIR."),
        ([], "missing is not a folder; give run folders, or folders of sweeps or studies."),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "missing", *options]) == 1
    assert capsys.readouterr().err.startswith(f"gemma2: {sentence}")
    assert list(tmp_path.iterdir()) == []
