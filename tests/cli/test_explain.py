"""`gemma2 config explain` and the comments of `gemma2 config show`: every key has a meaning, and YAML stays YAML."""

from functools import cache

import pytest
import yaml

from gemma2_jax.cli import explain
from gemma2_jax.cli.compose import chosen_files, compose, composed_values, keys
from gemma2_jax.cli.explain import explain_key, meaning, with_comments
from gemma2_jax.cli.main import main
from gemma2_jax.config import build, section_of, type_of
from gemma2_jax.run import RunConfig


@pytest.mark.parametrize("key", keys())
def test_every_key_has_a_meaning(key):
    above, _, name = key.rpartition(".")
    owner = section_of(type_of(RunConfig, above)) if above else RunConfig
    text = meaning(owner, name)
    assert text
    assert "\n" not in text


SECTIONS = sorted({key.rpartition(".")[0] for key in keys() if "." in key})


default_values = cache(composed_values)
default_files = cache(lambda: list(chosen_files([], None)))


@pytest.mark.parametrize("key", [*keys(), *SECTIONS])
def test_every_key_and_section_is_explained_with_its_meaning(key, monkeypatch):
    monkeypatch.setattr(explain, "chosen_files", lambda *defaults: default_files())
    head, text, *_ = explain_key(key, default_values(), [], None).splitlines()
    assert head == key
    assert len(text.split()) > 1


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["objective.temperature", "objective=distillation"], "1.0"),
        (["training.profile_steps", "training.steps=2", "profile=true"], "[3, 5]"),
        (["training.accumulation", "training.accumulation=7"], "7"),
        (["name", "name="], ""),
    ],
)
def test_what_would_not_run_is_explained(capsys, arguments, value):
    assert f"  value   {value}\n" in explained(capsys, *arguments)


def test_an_unknown_key_among_the_values_is_refused(capsys):
    assert main(["config", "explain", "seed", "training.stepz=3"]) == 1
    assert capsys.readouterr().err.startswith(
        "gemma2: there is no key training.stepz, did you mean training.steps"
    )


SET_IN_TEACHER = "set in  experiments/quickstart/teacher.yaml"


def explained(capsys, *arguments):
    assert main(["config", "explain", *arguments]) == 0
    return capsys.readouterr().out


def test_a_key_has_meaning_type_value_file_and_group(capsys):
    assert explained(capsys, "training.eval_every") == (
        "training.eval_every\n"
        "  steps between evaluations on the validation split; the last step is always evaluated.\n"
        "\n"
        "  type    a whole number\n"
        f"  value   {compose().training.eval_every}\n"
        "  set in  configs/training/short.yaml\n"
        "  group   training\n"
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["seed"], ["value   0", "set in  configs/train.yaml"]),
        (["optimizer.schedule", "optimizer=wsd"], ["value   wsd", "set in  configs/optimizer/wsd.yaml"]),
        (
            ["training.steps", "experiment=quickstart/teacher"],
            [f"value   {compose(['experiment=quickstart/teacher']).training.steps}", SET_IN_TEACHER],
        ),
        (
            ["optimizer.schedule", "experiment=quickstart/distilled"],
            ["set in  configs/optimizer/cosine.yaml"],
        ),
        (
            ["data.batch_size", "experiment=quickstart/distilled"],
            ["value   8", "set in  experiments/quickstart/scratch.yaml"],
        ),
        (
            ["distill.model.d_model", "experiment=distill_2b_from_9b"],
            ["value   3584", "set in  configs/model/gemma2_9b.yaml"],
        ),
        (["model.d_model", "experiment=distill_2b_from_9b"], ["set in  configs/model/gemma2_2b.yaml"]),
        (["layout.head", "layout=gathered"], ["set in  configs/layout/gathered.yaml"]),
        (["seed", "seed=3"], ["value   3", "set in  the command line"]),
        (["optimizer.beta1", "optimizer={beta1: 0.8}"], ["value   0.8", "set in  the command line"]),
        (["data.text_field"], ["type    text", "value   text", "set in  no file (the default in the code)"]),
        (["distill.on_policy.fraction"], ["value   null", "group   distill"]),
    ],
)
def test_value_and_file_are_those_of_the_command_line(capsys, arguments, lines):
    printed = [line.strip() for line in explained(capsys, *arguments).splitlines()]
    assert set(lines) <= set(printed)


@pytest.mark.parametrize(
    ("section", "names"), [([], ["seed", "training"]), (["mesh"], ["mesh.data", "mesh.fsdp"])]
)
def test_a_section_lists_its_keys(capsys, section, names):
    lines = explained(capsys, *section).splitlines()
    for name in names:
        assert any(line.split()[:1] == [name] and len(line.split()) > 2 for line in lines), name


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.stepz", "did you mean training.steps?"),
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("trainin", "did you mean training?"),
        ("qqqqqq", "`gemma2 config explain` lists them."),
        ("seed.x", "there is no key seed.x"),
    ],
)
def test_an_unknown_key_names_the_nearest(capsys, key, meant):
    assert main(["config", "explain", key]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"gemma2: there is no key {key}; ")
    assert meant in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["name=a: b # c", "data.source=[a, '- b', 'c: #d']"],
        [
            "objective=jsd",
            "distill=on_policy",
            "distill.teacher=t",
            "distill.on_policy.fraction=0.5",
        ],
    ],
)
def test_comments_do_not_change_the_configuration(overrides, capsys):
    config = compose(overrides)
    assert build(RunConfig, yaml.safe_load(with_comments(config)), "shown") == config
    assert main(["config", "show", "--comments", *overrides]) == 0
    shown = capsys.readouterr().out
    assert shown == with_comments(config)
    assert (
        "  # steps between rows of metrics; each row averages over the steps since the previous row.\n  log_every: "
        in shown
    )
