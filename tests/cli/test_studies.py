"""From a command line to the runs of a study and the combinations of a sweep."""

import pytest

from gemma2_jax.cli.compose_sweep import compose_sweep
from gemma2_jax.cli.main import main
from gemma2_jax.cli.roots import find_study, studies
from gemma2_jax.cli.run import compose_study
from gemma2_jax.config import UserError, load_config
from gemma2_jax.studies.config import StudyConfig
from tests.parameters import mostly_thorough


@mostly_thorough("name", ["quickstart", *sorted(set(studies()) - {"quickstart"})])
def test_every_study_composes_and_has_a_readme(name):
    study = load_config(StudyConfig, find_study(name))
    runs, output = compose_study(name, study, [], None)
    assert list(runs) == list(study.trained_runs())
    assert output == f"runs/{name}"
    assert (find_study(name).parent / "README.md").is_file()


def test_each_seed_of_a_run_and_its_cache():
    study = load_config(StudyConfig, find_study("teacher_source"))
    runs, _ = compose_study("teacher_source", study, ["sampled_12.model=toy"], None)
    assert [name for name in runs if name.startswith(("teacher", "sampled_12"))] == [
        "teacher",
        *("sampled_12-0", "sampled_12-1"),
    ]
    first, second = runs["sampled_12-0"], runs["sampled_12-1"]
    assert (first.seed, second.seed, second.data.seed, second.model.d_model) == (0, 1, 1, 32)
    assert {run.data.seed for name, run in runs.items() if name.endswith("-1")} == {
        1
    }  # the same for every arm
    assert first.distill.encoding is not None
    assert first.distill.encoding.entries == 12
    assert first.distill.cache == "runs/teacher_source/caches/sampled_12-0"
    assert {run.distill.teacher for run in (first, second)} == {"runs/teacher_source/teacher"}
    for override in ("seed=3", "data.seed=3", "sampled_12.data.seed=3", "data={seed:3}"):
        with pytest.raises(UserError, match=r"seed.*3.* has no effect, since study.yaml lists the seeds"):
            compose_study("teacher_source", study, [override], None)
    with pytest.raises(
        UserError, match=r"distill.cache=x has no effect, since the study chooses the cache folder of sampled"
    ):
        compose_study("teacher_source", study, ["sampled_12.distill.cache=x"], None)


@pytest.fixture
def quickstart():
    return load_config(StudyConfig, find_study("quickstart"))


def test_the_study_places_its_runs_and_their_teacher(quickstart):
    runs, _ = compose_study("quickstart", quickstart, ["output='runs/a b'", "seed=1", "data.seed=2"], None)
    assert [run.output for run in runs.values()] == [f"runs/a b/{name}" for name in runs]
    assert [run.name for run in runs.values()] == list(runs)
    assert {(run.seed, run.data.seed) for run in runs.values()} == {(1, 2)}
    assert runs["distilled"].distill.teacher == "runs/a b/teacher"
    assert runs["scratch"].distill.teacher is None


def test_a_key_goes_to_every_run_or_to_one(quickstart):
    overrides = ["training.steps=300", "distilled.training.steps=200", "scratch.model=toy"]
    runs, _ = compose_study("quickstart", quickstart, overrides, None)
    assert [run.training.steps for run in runs.values()] == [300, 300, 200]
    assert runs["scratch"].model.d_model == 32
    assert runs["distilled"].model.d_model == 96


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("distilled=3", "distilled=3 names a run of the study; accepted: distilled.KEY=VALUE."),
        ("distiled.seed=3", "there is no key distiled, did you mean distill"),
        ("distilled.sed=3", "there is no key sed, did you mean seed"),
        ("seed=1,2", "seed=1,2 lists several values"),
        ("name=mine", "name=mine has no effect, since study.yaml names the runs"),
        ("scratch.name=mine", "scratch.name=mine has no effect, since study.yaml names the runs"),
        (
            "distilled.output=there",
            "distilled.output=there has no effect, since the study puts each run into",
        ),
        ("distill.teacher=x", "distill.teacher=x has no effect, since study.yaml makes teacher"),
        ("distilled.distill.teacher=x", "makes teacher the teacher of distilled; leave it out"),
        ("distilled.distill={teacher: x}", "makes teacher the teacher of distilled; leave it out"),
    ],
)
def test_a_wrong_key_of_a_study_is_reported(quickstart, override, sentence):
    with pytest.raises(UserError) as caught:
        compose_study("quickstart", quickstart, [override], None)
    assert sentence in str(caught.value)


def test_what_the_study_leaves_free_may_be_set(quickstart):
    overrides = [
        "scratch.objective=mixture",
        "scratch.distill={teacher: x}",
        "distilled.distill={dtype: bfloat16}",
    ]
    runs, _ = compose_study("quickstart", quickstart, overrides, None)
    assert runs["scratch"].distill.teacher == "x"
    assert runs["distilled"].distill.teacher == "runs/quickstart/teacher"
    assert runs["distilled"].distill.dtype == "bfloat16"


def test_an_unknown_study_is_reported(capsys):
    assert main(["run", "quikstart"]) == 1
    assert "there is no study quikstart, did you mean quickstart (accepted: " in capsys.readouterr().err


def runs_of(sweep):
    return [run for trial in sweep.trials for run in trial]


def test_a_sweep_is_the_product_with_a_folder_for_each():
    overrides = [
        "experiment=quickstart/scratch",
        "optimizer.learning_rate=1e-3,3e-4",
        "seed=range(0,2)",
        "model=toy",
    ]
    sweep = compose_sweep(overrides)
    found, output = runs_of(sweep), sweep.output
    assert output == "runs/sweeps/quickstart/scratch/optimizer.learning_rate+seed"
    assert [combination.config.output for combination in found] == [
        f"{output}/optimizer.learning_rate={rate},seed={seed}"
        for rate in ("0.001", "0.0003")
        for seed in (0, 1)
    ]
    assert [combination.config.seed for combination in found] == [0, 1, 0, 1]
    assert len({combination.config.data for combination in found}) == 1  # in the same order
    assert {combination.config.model.d_model for combination in found} == {32}
    assert found[0].values == {"optimizer.learning_rate": "0.001", "seed": "0"}


def test_a_sweep_over_experiments_and_groups():
    overrides = ["experiment=quickstart/teacher,quickstart/scratch", "model=toy,small_1m", "output=out"]
    sweep = compose_sweep(overrides)
    found = runs_of(sweep)
    assert sweep.output == "out"
    assert found[0].config.output == "out/experiment=quickstart-teacher,model=toy"
    assert [combination.config.model.d_model for combination in found] == [32, 96, 32, 96]


def test_sweeps_over_other_keys_have_other_folders():
    assert compose_sweep(["seed=1,2"]).output == "runs/sweeps/train/seed"
    assert compose_sweep(["model=toy,small_1m"]).output == "runs/sweeps/train/model"


def test_nothing_is_run_where_a_combination_cannot_be_composed():
    with pytest.raises(UserError) as caught:
        compose_sweep(["optimizer.learning_rate=1e-3,x,-1", "seed=0,1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 6 combinations are invalid, so no run was started:"
    assert 'optimizer.learning_rate=x,seed=0: the configuration: optimizer.learning_rate is "x"' in lines[1]
    assert "optimizer.learning_rate=-1,seed=1: " in lines[4]
    assert "must be above 0" in lines[4]


@pytest.mark.thorough
def test_only_the_first_of_many_refusals_are_listed():
    with pytest.raises(UserError) as caught:
        compose_sweep(["seed=range(0,30)", "model.num_layers=3,4"])
    assert str(caught.value).splitlines()[-1] == "  and 20 more."


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=1"], "no key lists several values"),
        (["seed=1,2", "name=mine"], "name= has no effect, since a sweep names each run by its values"),
        (["name=a,b"], "name= has no effect, since a sweep names each run by its values"),
        (["seed=1,2", "output=a,b"], "output= lists several values, but a sweep has one folder"),
        (["optimizer.learning_rate=1e-3,0.001"], "optimizer.learning_rate=0.001 is listed twice"),
        (["sed=1,2"], "there is no key sed, did you mean seed"),
        (["experiment=quickstart/teachr", "seed=1,2"], "did you mean quickstart/teacher"),
    ],
)
def test_an_invalid_sweep_is_reported(overrides, sentence):
    with pytest.raises(UserError) as caught:
        compose_sweep(overrides)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("succeeds", "code"), [(True, 0), (False, 1)])
def test_a_sweep_with_a_failure_exits_with_1(monkeypatch, succeeds, code):
    monkeypatch.setattr("gemma2_jax.studies.sweep.run_sweep", lambda sweep, console: succeeds)
    assert main(["sweep", "seed=1,2"]) == code


def test_trackers_group_the_runs_of_a_sweep_or_study(quickstart):
    def groups(*overrides):
        sweep = compose_sweep(["seed=1,2", *overrides])
        return {each.config.metrics.group for trial in sweep.trials for each in trial}

    assert groups() == {compose_sweep(["seed=1,2"]).output}
    assert groups("metrics.group=mine", "metrics=wandb") == {"mine"}
    assert groups("output='out, of {all}'") == {"out, of {all}"}
    runs, _ = compose_study("quickstart", quickstart, ["output=out/q"], None)
    assert {run.metrics.group for run in runs.values()} == {"out/q"}
    runs, _ = compose_study("quickstart", quickstart, ["scratch.metrics.group=mine"], None)
    assert {name: run.metrics.group for name, run in runs.items()} == {
        "teacher": "runs/quickstart",
        "scratch": "mine",
        "distilled": "runs/quickstart",
    }
