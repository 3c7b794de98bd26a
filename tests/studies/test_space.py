"""The space of a sweep: its points, and what is refused."""

import math
from typing import Any

import pytest

from gemma2_jax.config import UserError, build, load_config, to_dict
from gemma2_jax.studies.space import (
    Choices,
    Interval,
    SweepConfig,
    axes,
    corners,
    grid,
    identity,
    random_point,
)

SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "model.num_layers": {"int": [2, 8]},
    "optimizer.beta1": {"uniform": [0.8, 1]},
    "model": ["toy", "small_1m"],
}


def config(**keys: Any) -> SweepConfig:
    return build(SweepConfig, {"method": "random", "trials": 4, "space": SPACE, **keys}, "sweep.yaml")


def test_a_space_as_in_yaml():
    assert axes(config()) == {
        "optimizer.learning_rate": Interval("log_uniform", 1e-4, 1e-1),
        "model.num_layers": Interval("int", 2, 8),
        "optimizer.beta1": Interval("uniform", 0.8, 1),
        "model": Choices(("toy", "small_1m")),
    }
    ranged = config(method="grid", trials=None, space={"seed": {"range": [0, 6, 2]}, "a": [True, None, 0.1]})
    assert axes(ranged) == {"seed": Choices(("0", "2", "4")), "a": Choices(("true", "null", "0.1"))}


def test_a_grid_changes_its_last_key_fastest():
    found = grid({"a": Choices(("1", "2")), "b": Choices(("x", "y"))})
    assert found == [{"a": a, "b": b} for a in "12" for b in "xy"]


def test_random_points_cover_their_axes_and_do_not_depend_on_each_other():
    space = axes(config())
    points = [random_point(space, 0, number) for number in range(400)]
    assert points[7] == random_point(space, 0, 7) != random_point(space, 1, 7)
    rates = [float(point["optimizer.learning_rate"]) for point in points]
    assert 1e-4 <= min(rates) < 1.5e-4
    assert 0.07 < max(rates) <= 1e-1
    assert sum(rate < math.sqrt(1e-4 * 1e-1) for rate in rates) == pytest.approx(
        200, abs=40
    )  # in the logarithm
    assert {point["model.num_layers"] for point in points} == set("2345678")
    assert {point["model"] for point in points} == {"toy", "small_1m"}
    assert max(len(point["optimizer.beta1"]) for point in points) <= len("0.812345")


def test_corners_are_all_bounds_or_a_sample_with_each_value():
    space = axes(config())
    assert len(corners(space)) == 2**4
    assert {point["optimizer.learning_rate"] for point in corners(space)} == {"0.0001", "0.1"}
    wide = {f"k{number}": Choices(tuple(map(str, range(70)))) for number in range(3)}
    found = corners(wide)
    assert len(found) == 70
    for key, axis in wide.items():
        assert {point[key] for point in found} == set(axis.values)


def test_only_what_decides_the_trials_identifies_a_sweep():
    assert identity(config(title="a", overrides=["seed=1"])) == identity(config(title="b"))
    assert identity(config(trials=5)) != identity(config())
    assert set(to_dict(config())) - set(identity(config())) == {"title", "experiment", "overrides"}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"method": "tpee"}, "method is tpee; did you mean tpe (accepted: grid, list, qmc, random, tpe)."),
        ({"metric": "cross_entropie"}, "metric is cross_entropie; did you mean cross_entropy"),
        ({"space": {}}, "space is empty, but method is random, which tries what space lists."),
        ({"space": {"a": []}}, "space.a is empty; list at least one value."),
        ({"space": {"a": {"range": [3, 3]}}}, "space.a is empty; list at least one value."),
        ({"space": {"a": [1, 1]}}, "space.a lists 1 twice; leave one of them out."),
        (
            {"space": {"a": {"log_unifrm": [1, 2]}}},
            "there is no kind log_unifrm for space.a, did you mean log_uniform (accepted:",
        ),
        ({"space": {"a": {}}}, "space.a is {}; give exactly one of range, uniform"),
        ({"space": {"a": {"uniform": [2, 1]}}}, "space.a.uniform is [2, 1]; accepted: [LOW, HIGH]"),
        ({"space": {"a": {"uniform": [2]}}}, "space.a.uniform is [2]; accepted: [LOW, HIGH]"),
        ({"space": {"a": {"log_uniform": [0, 1]}}}, "space.a.log_uniform is [0, 1]; both numbers must be"),
        ({"space": {"a": {"int": [0, 1.5]}}}, "space.a.int is [0, 1.5]; accepted: two whole numbers."),
        ({"space": {"a": {"range": [0, 4, 0]}}}, "space.a.range is [0, 4, 0]; accepted: [START, STOP]"),
        ({"space": {"name": ["a"]}}, "space.name cannot be swept, since the sweep sets it"),
        ({"overrides": ["model=toy"]}, "model is both in space and in overrides."),
        (
            {"space": {"experiment": ["a"]}, "experiment": "b"},
            "experiment is both in space and in experiment.",
        ),
        ({"space": {"seed": [1]}, "seeds": [0]}, "space.seed has no effect, since seeds lists the seeds"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]; each seed may be listed once."),
        ({"trials": None}, "trials is null, but method is random; set it to the number of points"),
        ({"trials": 0}, "trials is 0; it must be at least 1."),
        ({"method": "grid"}, "trials has no effect, since method is grid; leave it out."),
        (
            {"method": "grid", "trials": None},
            "space.optimizer.learning_rate is log_uniform, which has no grid",
        ),
        ({"method": "list", "trials": None, "runs": {"a": []}}, "space has no effect, since method is list"),
        ({"runs": {"a": []}}, "runs has no effect, since method is random; leave it out."),
        (
            {"method": "list", "trials": None, "space": {}, "runs": {"a b": []}},
            "runs.a b is not a valid name of a trial; accepted: letters, digits, _ and -.",
        ),
        ({"rungs": [20, 10]}, "rungs is [20, 10]; it must be a list of increasing steps"),
        ({"rungs": [0]}, "rungs is [0]; it must be a list of increasing steps"),
        (
            {"rungs": [5], "brackets": 3},
            "brackets is 3; it must be at most 2, one more than the number of rungs.",
        ),
        ({"reduction": 1}, "reduction is 1; it must be at least 2."),
        ({"trials": 10**6}, "trials is 1,000,000; it must be at most 10,000."),
        ({"sampler_seed": 2**32}, "sampler_seed is 4294967296; it must be below 2**32."),
        ({"overrides": ["name=x"]}, "overrides has name=x, which has no effect, since the sweep sets it"),
        (
            {"method": "list", "trials": None, "space": {}, "runs": {"a": ["output=x"]}},
            "runs.a has output=x, which has no effect, since the sweep sets it; leave it out.",
        ),
        (
            {"space": {"a": {"range": [0, 10**15]}}},
            "space.a.range is [0, 1000000000000000], which is 1,000,000,000,000,000 values; accepted: at most 10,000.",
        ),
        (
            {"method": "grid", "trials": None, "space": {key: {"range": [0, 9999]} for key in "ab"}},
            "space has 99,980,001 combinations; a grid has at most 10,000. List fewer values, or set method",
        ),
    ],
)
def test_a_wrong_sweep_is_one_sentence(keys, sentence):
    with pytest.raises(UserError) as caught:
        config(**keys)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("sweep.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("method: list\nruns:\n  a: [seed=1]\n  b: [seed=2]\n  a: [seed=3]\n")
    with pytest.raises(UserError, match=r"sweep.yaml is not valid YAML: the key a is there twice .*line 5"):
        load_config(SweepConfig, file)
