"""Studies: the order of stages, skipped stages, rejected changes, and the report."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from gemma2_jax.config import UserError, build
from gemma2_jax.processes.hosts import HostsConfig
from gemma2_jax.studies import stages
from gemma2_jax.studies.config import StudyConfig, StudyRun
from gemma2_jax.studies.study import run_study

STUDY = StudyConfig(
    "Does it help?",
    {"teacher": StudyRun("a"), "scratch": StudyRun("b"), "distilled": StudyRun("c", teacher="teacher")},
    reference="teacher",
    prompts=("The [first]", "Second"),
)


@pytest.fixture
def runs(toy):
    distill = ["objective=distillation", "distill=online", "distill.teacher=out/teacher"]
    return {
        "teacher": toy("teacher", "optimizer.learning_rate=0.1"),
        "scratch": toy("scratch", "optimizer.learning_rate=0.3"),
        "distilled": toy("distilled", "optimizer.learning_rate=0.2", *distill),
    }


@pytest.fixture
def console():
    return Console(width=200, record=True)


def test_stages_run_in_order_and_once(stage, runs, console):
    run_study(STUDY, runs, "out", console)
    names = ["teacher", "scratch", "distilled"]
    measured = [call for name in names for call in (("evaluate", name), ("sample", name))]
    assert stage.calls == [
        ("prepare", runs["teacher"].data.folder),
        *(("train", name) for name in names),
        *measured,
    ]

    stage.calls.clear()
    run_study(STUDY, runs, "out", console)
    assert stage.calls == [("prepare", runs["teacher"].data.folder)]  # which returns at once by itself
    assert console.export_text().count("already done, skipped") == 6


def test_a_stopped_study_resumes(stage, runs, console):
    stage.fails["scratch"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, runs, "out", console)
    stage.fails.clear()
    stage.calls.clear()
    run_study(STUDY, runs, "out", console)
    assert ("train", "teacher") not in stage.calls
    assert [call for call in stage.calls if call[0] == "train"] == [
        ("train", "scratch"),
        ("train", "distilled"),
    ]


def test_a_changed_configuration_is_refused_before_anything_runs(stage, runs, console):
    run_study(STUDY, runs, "out", console)
    changed = dataclasses.replace(runs["distilled"].optimizer, learning_rate=0.5)
    runs["distilled"] = dataclasses.replace(runs["distilled"], optimizer=changed)
    stage.calls.clear()
    with pytest.raises(UserError, match=r"out/distilled .*optimizer.learning_rate=0.2, but .* is now 0.5"):
        run_study(STUDY, runs, "out", console)
    assert stage.calls == []


def test_a_student_of_another_teacher_is_refused(stage, runs, console):
    run_study(STUDY, runs, "out", console)
    shutil.rmtree("out/teacher")
    stage.calls.clear()
    runs["teacher"] = dataclasses.replace(runs["teacher"], seed=5)
    with pytest.raises(
        UserError,
        match=r"out/distilled was distilled from a teacher with seed=0 .*, but .* is configured with seed=5",
    ):
        run_study(STUDY, runs, "out", console)
    assert stage.calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda run: {"hosts": HostsConfig(num_processes=2, process_id=1)},
        lambda run: {"data": dataclasses.replace(run.data, workers=7)},
        lambda run: {"compilation_cache": "programs", "profile": True},
    ],
    ids=["another process of the job", "workers", "programs"],
)
def test_keys_that_do_not_affect_results_may_change(stage, runs, console, change):
    run_study(STUDY, runs, "out", console)
    stage.calls.clear()
    changed = {name: dataclasses.replace(config, **change(config)) for name, config in runs.items()}
    run_study(STUDY, changed, "out", console)
    assert {kind for kind, _ in stage.calls} == {"prepare"}


def test_a_run_that_is_refused_leaves_nothing(stage, runs, console, monkeypatch):
    def refuse(config, until):
        if config.name == "distilled":
            raise UserError("it does not fit.")
        stage.train(config, until)

    monkeypatch.setattr(stages, "train", refuse)
    with pytest.raises(UserError, match=r"it does not fit"):
        run_study(STUDY, runs, "out", console)
    assert not Path("out/distilled").exists()


def test_other_prompts_are_sampled_without_training(stage, runs, console):
    run_study(STUDY, runs, "out", console)
    stage.calls.clear()
    run_study(dataclasses.replace(STUDY, prompts=("Third",)), runs, "out", console)
    assert {kind for kind, _ in stage.calls} == {"prepare", "evaluate", "sample"}


def test_the_table_fits_into_80_columns(stage, runs):
    console = Console(width=80, record=True)
    run_study(STUDY, runs, "out", console)
    printed = console.export_text()
    assert "…" not in printed
    assert [line.split() for line in printed.splitlines() if line.startswith(" distilled")] == [
        ["distilled", "12,345", "67,890", "0.2000", "2.00", "75.0", "%", "0.1250"],
        ["distilled", "1,025"],
    ]


def test_the_report(stage, runs, console):
    run_study(STUDY, runs, "out", console)
    printed = console.export_text()
    assert "The [first]" in printed
    assert "here [bold]" in printed  # text of a model is not markup
    report = Path("out/report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    agrees = ["agrees with teacher", "KL from teacher"]
    header = " | ".join(
        ["run", "parameters", "tokens seen", "validation cross-entropy", "perplexity", *agrees]
    )
    assert rows[:5] == [
        f"| {header} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| teacher | 12,345 | 67,890 | 0.1000 | 2.00 | – | – |",
        "| scratch | 12,345 | 67,890 | 0.3000 | 2.00 | 75.0 % | 0.1250 |",
        "| distilled | 12,345 | 67,890 | 0.2000 | 2.00 | 75.0 % | 0.1250 |",
    ]
    assert "- scratch: `` scratch goes `on`|⏎here [bold] ``" in report
    assert "Python 3" in report
    assert rows[5:10] == [
        "| run | tokens/s in training |",
        "| --- | ---: |",
        *(f"| {name} | 1,025 |" for name in runs),
    ]
    results = json.loads(Path("out/results.json").read_text())
    assert results["runs"]["distilled"]["cross_entropy"] == 0.2
    assert results["costs"]["scratch"]["tokens_per_second"] == 1025
    assert set(results["seconds"]) >= {"data", "train teacher", "evaluate distilled"}
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"runs": {}}, "runs is empty"),
        (
            {"runs": {"a": {"experiment": "x"}}, "reference": "b"},
            "reference is b; it must be one of the runs a.",
        ),
        (
            {"runs": {"a": {"experiment": "x", "teacher": "b"}, "b": {"experiment": "x"}}},
            "an earlier run (none)",
        ),
        (
            {"runs": {"a": {"experiment": "x", "teacher": "a"}}},
            "runs.a.teacher is a; it must be an earlier run",
        ),
        ({"runs": {"model": {"experiment": "x"}}}, "runs.model is not a valid name of a run"),
        ({"runs": {"a.b": {"experiment": "x"}}}, "runs.a.b is not a valid name of a run"),
        ({"runs": {"a": {"experimen": "x"}}}, "no key runs.a.experimen, did you mean experiment"),
        ({"runs": {"a": {"experiment": "x"}}, "sample_tokens": 0}, "sample_tokens is 0"),
    ],
)
def test_an_invalid_study_is_refused(data, sentence):
    with pytest.raises(UserError) as caught:
        build(StudyConfig, {"title": "?", **data}, "study.yaml")
    assert sentence in str(caught.value)


def test_a_finished_run_must_match_the_current_data(stage, toy, data, console):
    config = toy("done")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=data.folder))
    stages.train_run(config, console)
    identity = {"documents": "0123456789abcdef (1 files of 5 bytes)", "tokenizer": "0"}
    (Path(config.output) / "data.json").write_text(json.dumps(identity))
    with pytest.raises(UserError, match=r"was trained on other documents or with another tokenizer"):
        stages.train_run(config, console)
