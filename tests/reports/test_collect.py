"""Runs and evaluations from paths: what is found, named, left out and refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.reports.collect import collect
from gemma2_jax.reports.differences import differing_keys
from gemma2_jax.reports.intervals import seed_interval
from gemma2_jax.reports.report_tables import state
from gemma2_jax.reports.run_progress import progress_of
from gemma2_jax.reports.write import write_page
from tests.reports.conftest import WriteRun


def names(*paths: Path) -> list[str]:
    return [run.name for run in collect(paths).runs]


def test_a_study_has_its_title_and_machine(study: Path) -> None:
    report = collect([study])
    assert (report.title, list(report.machines)) == ("Which <source>?", ["A machine, 2 cores"])
    assert len(report.runs) == 10
    assert report.notes == []
    run = next(run for run in report.runs if run.name == "scratch-1")
    assert run.cross_entropy == pytest.approx(4.1)
    assert (run.scores["tokens_seen"], run.whole_split, run.steps, run.step) == (40 * 128, False, 40, 40)
    assert run.scores["parameters"] > 0
    assert run.flops_per_token is not None


def test_runs_are_in_the_order_of_the_study(study: Path) -> None:
    results = {"title": "?", "machine": "m", "runs": {"teacher": {}, "scratch-0": {}, "online-0": {}}}
    (study / "results.json").write_text(json.dumps(results))
    assert names(study)[:3] == ["teacher", "scratch-0", "online-0"]


def test_an_online_teacher_costs_flops_and_a_cache_does_not(study: Path) -> None:
    shutil.copy(study / "teacher/config.yaml", study / "online-0/teacher.yaml")
    flops = {run.name: run.flops_per_token for run in collect([study]).runs}
    assert flops["scratch-0"] == flops["cached-0"]
    assert flops["online-0"] is not None
    assert flops["scratch-0"] is not None
    assert flops["online-0"] > flops["scratch-0"]
    assert flops["online-1"] is None  # nothing tells the sizes of its teacher


def test_folders_above_hold_their_runs_and_each_counts_once(study: Path, sweep: Path, tmp_path: Path) -> None:
    assert len(names(tmp_path)) == 22
    assert len(names(study, study / "teacher")) == 10
    assert len(names(tmp_path, sweep)) == 22


def test_machines_of_runs_are_listed_once(write_run: WriteRun) -> None:
    folders = [write_run("a"), write_run("b")]
    (folders[0] / "machine.txt").write_text("one\ntwo\n")
    (folders[1] / "machine.txt").write_text("two\n")
    assert collect(folders).machines == ["one", "two"]


def test_a_sweep_has_its_values_and_its_failed_run(sweep: Path) -> None:
    runs = collect([sweep]).runs
    (failed,) = [run for run in runs if run.error is not None]
    assert failed.error == "the loss is <nan>"
    assert state(failed) == "failed"
    assert failed.values["seed"] == "1"
    assert runs[0].values == {"optimizer.learning_rate": "0.01", "optimizer.weight_decay": "0.0", "seed": "0"}


def test_one_run_of_a_sweep_comes_alone(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep / "optimizer.learning_rate=0.1,optimizer.weight_decay=0.0,seed=0"
    assert names(folder) == ["learning_rate=0.1 weight_decay=0.0 seed=0"]
    monkeypatch.chdir(folder)
    assert names(Path(".")) == ["learning_rate=0.1 weight_decay=0.0 seed=0"]


def test_results_name_the_runs_of_a_sweep_whatever_their_folders_are(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("sweep/000,wide-1234abcd", name="000,wide-1234abcd")
    results = [
        {"run": "000,wide-1234abcd", "values": {"model": "wide", "seed": "1"}, "cross_entropy": 4.0},
        {"run": "001,narrow", "values": {"model": "narrow"}, "error": "too small"},
    ]
    (tmp_path / "sweep/results.json").write_text(json.dumps(results))
    one, two = collect([tmp_path / "sweep"]).runs
    assert (one.name, one.values, one.error) == ("model=wide seed=1", {"model": "wide", "seed": "1"}, None)
    assert (two.name, two.folder, two.error) == ("model=narrow", tmp_path / "sweep/001,narrow", "too small")


def test_a_sweep_in_progress_has_the_values_of_its_names(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("sweep/a", name="optimizer.learning_rate=0.1,seed=1")
    write_run("sweep/b", name="007,optimizer.learning_rate=0.2,data.mixture=[x,y]")
    assert sorted(names(tmp_path)) == ["learning_rate=0.1 seed=1", "learning_rate=0.2 mixture=[x,y]"]


def test_runs_of_one_name_are_named_by_their_folders(write_run: WriteRun) -> None:
    folders = [write_run(folder, name="same") for folder in ("a/x/run", "b/x/run", "b/y/run")]
    assert names(*folders, write_run("c/other")) == ["a/x/run", "b/x/run", "b/y/run", "other"]


def test_a_damaged_line_is_left_out_with_a_note(write_run: WriteRun) -> None:
    folder = write_run("run")
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([whole[0], "{broken\n", *whole[1:], '{"step": 50, "sp']))
    report = collect([folder])
    assert len(report.runs[0].rows) == len(whole)
    assert report.notes == [f"{folder / 'metrics.jsonl'}, line 2, is not a row of metrics; it is left out."]


def test_a_run_without_validation_has_no_loss(write_run: WriteRun) -> None:
    (run,) = collect([write_run("run", None)]).runs
    assert run.cross_entropy is None
    assert run.scores["tokens_seen"] == 40 * 128


def test_a_run_that_has_just_begun_is_a_run(write_run: WriteRun) -> None:
    folder = write_run("run")
    (folder / "metrics.jsonl").unlink()
    (run,) = collect([folder]).runs
    assert state(run) == "0 of 40 steps"


def test_damaged_files_are_notes(write_run: WriteRun) -> None:
    folder = write_run("a/run")
    (folder / "config.yaml").write_text("a: [")
    (folder / "evaluation.json").write_text("{")
    (folder.parent / "results.json").write_text("[")
    report = collect([folder])
    assert report.runs[0].name == "run"
    assert [note.partition(" is ")[0] for note in report.notes] == [
        str(folder / "config.yaml"), str(folder / "evaluation.json"), str(folder.parent / "results.json")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"step": True},
        {"step": -1},
        {"step": 10**400},
        {"step": 5, "seconds": "x"},
        {"step": 5, "tokens_per_second": None},
        {"step": 5, "cross_entropy": 10**400},
    ],
)
def test_a_row_of_other_than_numbers_is_left_out(write_run: WriteRun, row: dict[str, Any]) -> None:
    folder = write_run("run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"split": "train", **row}) + "\n")
    (note,) = collect([folder]).notes
    assert note.endswith("line 7, is not a row of metrics; it is left out.")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"step": 10, "split": "train", "seconds": NaN}\n'),
        ("metrics.jsonl", '{"step": 10, "split": "train", "seconds": 1e308}\n' * 3),
        ("config.yaml", "training: {steps: x, log_every: []}\ndata: {batch_size: .inf, seq_len: {}}\n"),
        ("config.yaml", f"training: {{steps: {10**400}}}\ndata: {{batch_size: 1, seq_len: {10**400}}}\n"),
        ("config.yaml", 'distill: {teacher: "a\\0b"}\n'),
        (
            "evaluation.json",
            '{"evaluation": {"parameters": 1e400}, "conditions": {"prompts": 1}, "samples": true}',
        ),
        ("../results.json", '{"title": [], "machine": {}}'),
        ("data.json", "[1]"),
    ],
)
def test_files_of_other_content_end_no_report(write_run: WriteRun, file: str, content: str) -> None:
    folder = write_run("a/run")
    (folder / file).write_text(content)
    output, tables = str(folder / "page.html"), str(folder / "runs.csv")
    _, shown = write_page([folder, write_run("b")], output, tables, str(folder / "page.md"))
    assert len(shown.report.runs) == 2
    assert progress_of(folder).step in (0, 10, 40)


@pytest.mark.parametrize(
    "row",
    [
        {"name": 3},
        {"scores": [1]},
        {"scores": {"document": 1}},
        {"scores": {"document": {"domains": "x"}}},
        {"scores": {"document": {"domains": {"a": 1}}}},
        {"memorisation": {"total": 1}},
        {"tasks": {"arc": {"metrics": {"acc": 1}}}},
        {"left_out": "arc"},
    ],
)
def test_an_evaluation_of_another_shape_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "e.json").write_text(json.dumps({"format": 1, "rows": [{"name": "m", **row}]}))
    with pytest.raises(UserError, match=r"e\.json is not a file of gemma2 eval; accepted:"):
        collect([tmp_path / "e.json"])


def test_a_loop_of_links_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop does not exist; accepted: run folders"):
        collect([tmp_path / "loop"])


def test_an_infinite_loss_has_no_interval() -> None:
    found = seed_interval([1.0, 2.0, math.inf])
    assert (found.mean, found.low, found.count) == (math.inf, None, 3)


def test_an_evaluation_counts_until_the_run_goes_on(write_run: WriteRun) -> None:
    folder = write_run("run")
    evaluation = {"cross_entropy": 3.5, "perplexity": 33.1, "kl": None}
    stored = {"conditions": {"step": 40, "prompts": ["p"]}, "evaluation": evaluation, "samples": ["s"]}
    (folder / "evaluation.json").write_text(json.dumps(stored))
    (run,) = collect([folder]).runs
    assert (run.cross_entropy, run.whole_split, "kl" in run.scores) == (3.5, True, False)
    assert [(sample.prompt, sample.text) for sample in run.samples] == [("p", "s")]
    stored["conditions"]["step"] = 20  # type: ignore[index]
    (folder / "evaluation.json").write_text(json.dumps(stored))
    report = collect([folder])
    assert report.runs[0].cross_entropy == pytest.approx(4.0)
    assert "is of step 20, and the run is at step 40" in report.notes[0]


def test_differences_are_only_the_keys_that_differ(write_run: WriteRun) -> None:
    folders = [write_run("a", changes={"seed": 3}), write_run("b", changes={"optimizer.kind": "muon"})]
    assert differing_keys(collect(folders).runs) == {"seed": ["3", "0"], "optimizer.kind": ["adamw", "muon"]}


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/results.json").write_text("[]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.yaml").write_text("model: {}\n")
    (tmp_path / "file.json").write_text("{}")
    for name, sentence in (
        (
            "empty",
            "holds no run; looked for metrics.jsonl, and for config.yaml of a run, in it and in the folders",
        ),
        ("sweep", "holds no run"),
        ("missing", "does not exist; accepted: run folders"),
        ("model", "holds a model without a run"),
        ("file.json", "is not a file of gemma2 eval"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            collect([tmp_path / name])
        assert str(caught.value).startswith(str(tmp_path / name))


def test_evaluations_have_tables(tmp_path: Path) -> None:
    from gemma2_jax.reports.evaluations import evaluation_tables

    scores = {"tokens": 1200, "cross_entropy": 3.25, "kl": None, "bins": [{"tokens": 3}]}
    part = {"domains": {"code": scores, "<b>": scores}, "total": {**scores, "tokens": 2400}}
    content = {
        "format": 1,
        "context": 64,
        "devices": "8 x cpu",
        "rows": [{"name": "a", "scores": {"document": part}, "memorisation": None}],
    }
    (tmp_path / "eval.json").write_text(json.dumps(content))
    report = collect([tmp_path / "eval.json"])
    assert report.machines == ["8 x cpu"]
    ((title, columns),) = evaluation_tables(report.evaluations)
    assert title == f"{tmp_path / 'eval.json'}: document windows of 64 tokens"
    assert {column.name: [cell.text for cell in column.cells] for column in columns} == {
        "checkpoint": ["a"] * 3,
        "domain": ["code", "<b>", "all domains"],
        "tokens": ["1,200", "1,200", "2,400"],
        "cross entropy": ["3.2500"] * 3,
    }
    (tmp_path / "eval.json").write_text(json.dumps({**content, "format": 7}))
    with pytest.raises(UserError, match="has the format 7, and this version reads format 1"):
        collect([tmp_path / "eval.json"])


def test_evaluations_by_tasks_have_a_table(tmp_path: Path) -> None:
    from gemma2_jax.reports.evaluations import evaluation_tables

    metrics = {"acc": {"value": 0.25, "stderr": 0.125}, "perplexity": {"value": None, "stderr": None}}
    row = {
        "name": "a",
        "tasks": {"quiz": {"metrics": metrics, "version": "1", "shots": 5, "documents": 12}},
        "left_out": {"lost": "lost cannot be loaded"},
    }
    (tmp_path / "tasks.json").write_text(json.dumps({"format": 1, "context": 64, "rows": [row]}))
    ((title, columns),) = evaluation_tables(collect([tmp_path / "tasks.json"]).evaluations)
    assert title == f"{tmp_path / 'tasks.json'}: tasks of the evaluation harness"
    assert {column.name: [cell.text for cell in column.cells] for column in columns} == {
        "checkpoint": ["a", "a", "a"],
        "task": ["quiz", "quiz", "lost"],
        "metric": ["acc", "perplexity", "–"],
        "value": ["0.2500", "–", "–"],
        "standard error": ["0.1250", "–", "–"],
        "shots": ["5", "5", "–"],
        "documents": ["12", "12", "–"],
        "left out": ["–", "–", "lost cannot be loaded"],
    }
