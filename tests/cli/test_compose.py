"""From groups, experiments and key=value to a run's configuration."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from gemma2_jax.cli.compose import combinations, compose, compose_file, groups, pairs
from gemma2_jax.cli.roots import choices, find_study, studies
from gemma2_jax.config import UserError, save_config, to_dict
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import build_schedule
from gemma2_jax.training.optimizer import learning_rate_schedule


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name):
    assert isinstance(compose([f"experiment={name}"]), RunConfig)


@pytest.mark.parametrize("group", [group for group in groups() if group != "experiment"])
def test_every_choice_of_every_group_composes(group):
    needs = {
        "distill": ["distill.teacher=runs/x", "objective=distillation"],
        "initialise": ["initialise.source=runs/x"],
        "objective": ["distill=online", "distill.teacher=runs/x"],
        "data": ["data.source=x.txt"],
        "tokenizer": ["model.vocab_size=4096"],
        "adaptation": ["initialise=checkpoint", "initialise.source=runs/x"],
    }
    more = {
        "cached": ["distill.cache=runs/x-cache"],
        "match": ["distill.match.layers=[[1,3]]"],
        "mixture": ["data.source=[]", "data.mixture=[{source: x.txt, weight: 1}]"],
    }
    for name in choices(group):
        without = name in ("none", "cross_entropy", "random") or group not in needs
        given = [] if without else [*needs[group], *more.get(name, [])]
        assert isinstance(compose([f"{group}={name}", *given]), RunConfig)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_every_optimizer_suits_a_short_run(optimizer, steps):
    config = compose([f"optimizer={optimizer}", f"training.steps={steps}"])
    rates = [float(learning_rate_schedule(config.optimizer, steps)(step)) for step in range(steps)]
    assert all(0 < rate <= config.optimizer.learning_rate * 1.0001 for rate in rates)


def test_a_schedule_of_the_objective_suits_a_short_run():
    teacher = ["distill=online", "distill.teacher=runs/teacher"]
    config = compose(["objective=scheduled_mixture", "training.steps=3", *teacher])
    at = build_schedule(config.objective.schedules["mix"], 3)
    assert [float(at(step)) for step in range(3)] == [0, 1, 0]


def test_a_single_text_is_not_a_list_of_overrides():
    with pytest.raises(UserError) as error:
        compose("model=toy")
    assert str(error.value) == "overrides is the text 'model=toy'; it must be a list, as in ['model=toy']."


def test_every_group_is_a_part_of_the_run_and_has_choices():
    single = {"name", "output", "seed", "compilation_cache", "profile"}
    assert {*groups(), *single} - {"experiment"} == {field.name for field in dataclasses.fields(RunConfig)}
    assert all(choices(group) for group in groups())


@pytest.mark.parametrize(
    ("name", "sizes", "scalar"),
    [
        ("gemma2_2b", (26, 2304, 8, 4, 256, 9216), 256),
        ("gemma2_9b", (42, 3584, 16, 8, 256, 14336), 256),
        ("gemma2_27b", (46, 4608, 32, 16, 128, 36864), 144),
    ],
)
def test_the_three_gemmas_are_the_reports(name, sizes, scalar):
    shown = list(to_dict(compose([f"model={name}"]).model).values())
    assert shown == [256128, *sizes, 4096, scalar, 50.0, 30.0, 10000.0, 1e-6, 128, 1]


def test_overrides_win_over_the_experiment_and_the_experiment_over_the_groups():
    assert compose(["experiment=quickstart/teacher"]).model == compose(["model=small_3m"]).model
    config = compose(
        ["experiment=quickstart/teacher", "model=toy", "model.num_layers=4", "training.steps=77"]
    )
    assert (config.model.d_model, config.model.num_layers, config.training.steps) == (32, 4, 77)


def test_references_follow_what_they_refer_to():
    config = compose(["name=mine", "tokenizer.vocab_size=600"])
    assert (config.output, config.model.vocab_size) == ("runs/mine", 600)
    cached = ["distill=cached", "distill.teacher=runs/x", "distill.cache=runs/x-cache"]
    warm = compose([*cached, "objective=distillation", "objective.temperature=2.0"])
    assert warm.distill.encoding is not None
    assert warm.distill.encoding.temperature == 2.0


@pytest.mark.parametrize("data", ["python_docs", "files"])
def test_the_seed_of_the_weights_does_not_change_the_data(data):
    chosen = [f"data={data}", "data.source=x.txt"]
    assert compose([*chosen, "seed=7"]).data == compose(chosen).data
    config = compose([*chosen, "seed=7", "data.seed=3"])
    assert (config.seed, config.data.seed) == (7, 3)


@pytest.mark.parametrize("data", ["python_docs", "files"])
def test_each_vocabulary_size_has_a_folder_and_a_tokenizer_of_its_own(data):
    chosen = [f"data={data}", "data.source=x.txt"]
    small, large = (compose([*chosen, f"tokenizer.vocab_size={size}"]) for size in (600, 800))
    assert (small.data.folder, large.data.folder) == (f"runs/data/{data}_600", f"runs/data/{data}_800")
    assert small.tokenizer.path == f"{small.data.folder}/tokenizer.model"
    assert large.tokenizer.path == f"{large.data.folder}/tokenizer.model"


def test_a_mapping_changes_only_the_keys_that_it_names():
    config = compose(["optimizer={learning_rate: 0.5, clip_norm: 2}"])
    base = compose().optimizer
    assert config.optimizer == dataclasses.replace(base, learning_rate=0.5, clip_norm=2.0)


def test_distilled_and_scratch_differ_in_the_objective_alone():
    scratch = to_dict(compose(["experiment=quickstart/scratch"]))
    distilled = to_dict(compose(["experiment=quickstart/distilled"]))
    assert {key for key in scratch if scratch[key] != distilled[key]} == {
        "name",
        "output",
        "objective",
        "distill",
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=gemm2_2b"], "there is no model gemm2_2b, did you mean gemma2_2b (accepted: gemma2_27b, "),
        (
            ["experiment=quickstart/teach"],
            "did you mean quickstart/teacher (accepted: deep_vs_wide/model, distill_2b_from_9b, ",
        ),
        (
            ["optimizer.learning_rat=1"],
            "no key optimizer.learning_rat, did you mean learning_rate (accepted: beta1,",
        ),
        (["optimiser.learning_rate=1"], "no key optimiser, did you mean optimizer (accepted: adaptation, "),
        (["seeds=1"], "no key seeds, did you mean seed (accepted: "),
        (["seed.x=1"], "no key seed.x, since seed is a single value (0), not a section."),
        (["training.steps=1.5"], "training.steps is 1.5; accepted: a whole number."),
        (["training.steps=true"], "training.steps is true; accepted: a whole number."),
        (["compute.dtype=float16"], 'compute.dtype is "float16"; accepted: float32 or bfloat16.'),
        (["model.num_layers=3"], "model.num_layers is 3; it must be even"),
        (["objective=distillation"], "objective.forward_kl is above 0, which needs a teacher"),
        (["objective=distillation", "distill=online"], "distill.teacher has no value; set it with"),
        (
            ["training.steps=1,2"],
            "training.steps=1,2 lists several values, which only `gemma2 sweep` accepts.",
        ),
        (
            ["seed=${nothing}"],
            "seed has a reference that cannot be resolved: Interpolation key 'nothing' not found.",
        ),
        (["steps"], "'steps' cannot be read; accepted: key=value"),
        (["=1"], "'=1' cannot be read; accepted: key=value"),
        (["+seed=1"], "'+seed=1' cannot be read; accepted: key=value"),
        (["~seed"], "'~seed' cannot be read; accepted: key=value"),
        (["name=[a"], "'name=[a' cannot be read; accepted: key=value"),
        (["training.steps", "=", "5"], "cannot be read; write it without blanks: training.steps=5."),
        (["training.steps", "=5"], "cannot be read; write it without blanks: training.steps=5."),
        (["seed=1", "training.steps=", "5"], "cannot be read; write it without blanks: training.steps=5."),
        (["training.steps = 5"], "cannot be read; write it without blanks: training.steps=5."),
        (["training.steps:", "5"], "cannot be read; write it without blanks: training.steps=5."),
        (["steps", "seed=1"], "'steps' cannot be read; accepted: key=value"),
        (["data.source=a.txt,b.txt"], "to give one list, write 'data.source=[a.txt,b.txt]'."),
        (
            ["name=../x"],
            "name is ../x; accepted: text without / and \\, except . and ..; to choose the run",
        ),
        (["name=a/b"], "use output=a/b."),
        (["name=/tmp/x"], "use output=/tmp/x."),
        (["name=.."], "use output=..."),
        (["name='a\\b'"], "name is a\\b; accepted: text without / and \\"),
        (["name=\udcff"], "'name=\\udcff' is not UTF-8"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(overrides, sentence):
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hydra" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "text",
    ["1", "1e3", "1_000", "0x10", "007", "true", "null", "nan", "2024-01-01", "12:30:00", "é", "a 'b c"],
)
def test_a_key_of_text_has_the_text_as_typed(text, tmp_path):
    """Also after saving and loading the configuration."""
    config = compose([f"name={text}", f"tokenizer.path={text}", f"data.text_field={text}"])
    assert (config.name, config.tokenizer.path, config.data.text_field) == (text, text, text)
    assert config.output == f"runs/{text}"
    save_config(config, tmp_path / "config.yaml")
    assert compose_file(tmp_path / "config.yaml") == config


def test_text_as_typed_keeps_null_lists_and_quotes():
    taught = ["objective=distillation", "distill=online", "distill.teacher=9"]
    assert compose(taught).distill.teacher == "9"
    assert compose(["compilation_cache=null"]).compilation_cache is None
    assert compose(["data.source=[1,1e3, true,a b]"]).data.source == ("1", "1e3", "true", "a b")
    assert compose(["name='1'"]).name == "1"
    assert compose(["data.source=my notes/*.md"]).data.source == "my notes/*.md"
    with pytest.raises(UserError, match="there is no model 1e3, accepted"):
        compose(["model=1e3"])


def test_text_of_a_file_that_looks_like_a_date_is_text_and_a_number_needs_quotes(tmp_path):
    (tmp_path / "experiments").mkdir()
    dated, numbered = (tmp_path / "experiments" / f"{name}.yaml" for name in ("dated", "numbered"))
    dated.write_text("# @package _global_\nname: 2024-01-01\n")
    numbered.write_text("# @package _global_\nname: 1\n")
    assert compose(["experiment=dated"], tmp_path).name == "2024-01-01"
    with pytest.raises(UserError, match=r"name is 1; accepted: text\. Write it in quotes for text: '1'."):
        compose(["experiment=numbered"], tmp_path)
    save_config(compose(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text().replace("name: run", "name: 2024-01-01")
    (tmp_path / "config.yaml").write_text(text)
    assert compose_file(tmp_path / "config.yaml").name == "2024-01-01"


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        (["model=smal", "data=fils"], ["there is no model smal, did", "there is no data fils, did"]),
        (
            ["data=files", "training.stepz=3"],
            ["data.source has no value; set it with", "no key training.stepz, did"],
        ),
        (
            ["data.seq_len=1", "data.batch_size=0", "training.steps=0"],
            ["data.seq_len is 1;", "data.batch_size is 0;", "training.steps is 0;"],
        ),
        (
            ["checkpoint.every=3", "training.accumulation=5", "objective=distillation"],
            ["checkpoint.every is 3;", "training.accumulation is 5,", "objective.forward_kl is above 0,"],
        ),
    ],
)
def test_mistakes_that_can_be_found_together_are_reported_together(overrides, sentences):
    with pytest.raises(UserError) as caught:
        compose(overrides)
    lines = str(caught.value).split("\n")
    for sentence in sentences:
        assert sum(sentence in line for line in lines) == 1


def test_a_saved_run_is_repeated_from_its_file_alone(tmp_path, monkeypatch):
    config = compose(["experiment=quickstart/distilled", "seed=3", "data.source=[a.txt,b.md]"])
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert compose_file("config.yaml") == config
    changed = compose_file("config.yaml", ["training.steps=900", "model.sliding_window=null"])
    assert (changed.training.steps, changed.model.sliding_window) == (900, None)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.step=1", "there is no key training.step, did you mean steps (accepted: "),
        ("model=toy", "model=toy chooses a config file, but config.yaml is already composed"),
        ("experiment=quickstart/teacher", "chooses a config file, but config.yaml is already composed"),
    ],
)
def test_a_saved_run_refuses_what_it_does_not_know(tmp_path, monkeypatch, override, sentence):
    monkeypatch.chdir(tmp_path)
    save_config(compose(), "config.yaml")
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as caught:
        compose_file("config.yaml", [override])
    assert sentence in str(caught.value)


def test_a_folder_of_the_users_own_adds_and_wins(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "experiments" / "deep").mkdir(parents=True)
    toy = to_dict(compose(["model=toy"]).model)
    (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump({**toy, "num_layers": 6}))
    (tmp_path / "model" / "toy.yaml").write_text(yaml.safe_dump({**toy, "num_layers": 8}))
    (tmp_path / "experiments" / "deep" / "one.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: mine]\nname: one\n"
    )
    (tmp_path / "experiments" / "deep" / "study.yaml").write_text("title: x\n")
    assert compose(["model=mine"], tmp_path).model.num_layers == 6
    assert compose(["model=toy"], tmp_path).model.num_layers == 8
    assert compose(["experiment=deep/one"], tmp_path).model.num_layers == 6
    assert compose(["experiment=quickstart/teacher"], tmp_path).name == "quickstart/teacher"
    assert {"mine", "toy", "gemma2_2b"} <= set(choices("model", tmp_path))
    assert "deep/one" in choices("experiment", tmp_path)
    assert "deep/study" not in choices("experiment", tmp_path)
    assert find_study("deep", tmp_path) == tmp_path / "experiments" / "deep" / "study.yaml"
    with pytest.raises(UserError, match="there is no study deap, did you mean deep"):
        find_study("deap", tmp_path)


def test_an_experiment_that_names_a_missing_file_is_reported(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "bad.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: toyy]\n"
    )
    (tmp_path / "experiments" / "worse.yaml").write_text("defaults: [override /modell: toy]\n")
    with pytest.raises(
        UserError, match=r"refers to the file model/toyy.yaml, which does not exist, did you mean toy "
    ):
        compose(["experiment=bad"], tmp_path)
    with pytest.raises(UserError, match=r"\Athe configuration cannot be composed: [^\n]*modell[^\n]*\Z"):
        compose(["experiment=worse"], tmp_path)


@pytest.mark.parametrize("content", [b"a: [1\n", b"- 1\n", b"\xff\xfe", b"a: 1\na: 2\n", b""])
def test_a_broken_file_of_the_user_is_reported(tmp_path, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"\Athe configuration[^\n]*\Z"):
        compose(["model=mine"], tmp_path)


def test_a_config_dir_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config-dir is .*nowhere, which is not a folder"):
        compose([], tmp_path / "nowhere")


def test_composing_leaves_no_trace(tmp_path, monkeypatch):
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    compose(["experiment=quickstart/teacher"])
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()
    assert {**os.environ} == environment


def test_works_from_a_folder_whose_name_needs_quotes(tmp_path):
    odd = tmp_path / "it's a, [folder]"
    (odd / "model").mkdir(parents=True)
    (odd / "model" / "mine.yaml").write_text(yaml.safe_dump(to_dict(compose(["model=toy"]).model)))
    assert compose(["model=mine"], odd).model == compose(["model=toy"]).model


def test_combinations_are_the_product_in_order():
    listed, shared = combinations(["a=1,2", "b=3", "c=range(0,2)", "d='x y',null"])
    assert shared == ["b=3"]
    assert len(listed) == 8
    assert listed[0] == {"a": "1", "c": "0", "d": "'x y'"}
    assert listed[1] == {"a": "1", "c": "0", "d": "null"}
    assert listed[-1] == {"a": "2", "c": "1", "d": "null"}
    assert combinations(["b=3"]) == ([{}], ["b=3"])
    with pytest.raises(UserError, match=r"accepted: key=A,B or key=range\(1,4\)"):
        combinations(["a=glob(*)"])


def test_pairs_are_typed():
    assert pairs(["a=1", "b=x", "c='1'", "d=[1,e]", "e.f=null"]) == [
        ("a", 1),
        ("b", "x"),
        ("c", "1"),
        ("d", [1, "e"]),
        ("e.f", None),
    ]


def test_studies_are_next_to_their_experiments():
    assert "quickstart" in studies()
    assert all(isinstance(path, Path) and path.is_file() for path in studies().values())
