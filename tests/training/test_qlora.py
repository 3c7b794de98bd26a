"""Training an adapter beside a model in four bits: as LoRA learns, on every mesh, stopped, resumed and planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import describe_params
from gemma2_jax.config import UserError
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.load import load_params, open_source
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.adaptation import AdaptationConfig, divided_specs
from gemma2_jax.model.counts import count_weights
from gemma2_jax.model.linear import for_use
from gemma2_jax.model.lora import TARGETS
from gemma2_jax.model.quantised import INT4, NF4, Format, is_quantised, stored
from gemma2_jax.model.weights import frozen_dtypes, map_specs, weight_specs
from gemma2_jax.planning.memory import frozen_bytes
from gemma2_jax.planning.placement import find_placement
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.overview import describe_runs
from gemma2_jax.training.together import method_of
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.steps import take_steps
from tests.training.methods import KL, beside_frozen, rows, with_method
from tests.training.stops import stopped_after

pytestmark = pytest.mark.thorough

QLORA = AdaptationConfig("qlora", rank=4, alpha=8.0, targets=tuple(TARGETS), base="nf4")
LORA = replace(QLORA, kind="lora", base=None)


@pytest.fixture(scope="module")
def base(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with two blocks of nf4 in each column of `down`, for two devices along mesh.tensor."""
    model = vivid(replace(toy_run.model, d_ff=128))
    return write_teacher(toy_run, model, tmp_path_factory.mktemp("qlora") / "base")


@pytest.fixture(scope="module")
def qlora(toy_run: RunConfig, base: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    model = replace(toy_run.model, d_ff=128)
    return beside_frozen(toy_run, QLORA, base, tmp_path_factory.mktemp("qlora"), model=model)


@pytest.fixture(scope="module")
def finished(qlora: RunConfig) -> RunConfig:
    train(qlora)
    return qlora


def test_a_run_is_resumed_bit_by_bit_and_saves_its_adapter_alone(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, output=str(tmp_path / "run"))
    with stopped_after(3):
        train(run)
    train(run)
    assert rows(run.output) == rows(finished.output)
    _, found = describe_params(run.output)
    assert found
    assert all(path.endswith(("/a", "/b")) for path in found)


@pytest.mark.thorough
def test_a_quantised_student_samples(qlora: RunConfig, base: str, tmp_path: Path) -> None:
    run = with_method(qlora, "on-policy", base, tmp_path)
    train(run)
    # The teacher is the base itself, so that only the error of quantisation is left to learn.
    trained = [row for row in rows(run.output) if row["split"] == "train"]
    assert 0 < trained[-1]["loss"] < 0.2


def test_another_format_is_refused(finished: RunConfig) -> None:
    with pytest.raises(UserError, match=r"adaptation.base=nf4, but adaptation.base is now int4"):
        train(replace(finished, adaptation=replace(QLORA, base="int4")))


@pytest.mark.parametrize("base_format", ["nf4", pytest.param("int4", marks=pytest.mark.thorough)])
def test_the_loss_is_that_of_lora_within_a_tenth(
    qlora: RunConfig, base_format: Any, finished: RunConfig
) -> None:
    """The loss and the gain of training; a base in four bits starts a little higher."""
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    iterator = train_batches(qlora.data)
    batches = [next(iterator) for _ in range(5)] * 4
    losses = {}
    for adaptation in (LORA, replace(QLORA, base=base_format)):
        _, found = take_steps(replace(qlora, adaptation=adaptation), mesh, batches)
        losses[adaptation.kind] = [row["loss"] for row in found]
    first, last = ([of[step] for of in losses.values()] for step in (0, -1))
    assert last[0] < first[0] - 0.5  # LoRA learns
    assert last[1] == pytest.approx(last[0], rel=0.1)
    assert first[1] == pytest.approx(first[0], rel=0.1)
    assert first[1] != first[0]


def test_a_mesh_gives_the_numbers_of_one_device(qlora: RunConfig) -> None:
    iterator = train_batches(qlora.data)
    batches = [next(iterator) for _ in range(2)]
    one, expected = take_steps(qlora, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), batches)
    state, found = take_steps(qlora, build_mesh(qlora.mesh), batches)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    chex.assert_trees_all_close(state.trainable, one.trainable, atol=2e-4)


@pytest.mark.parametrize("format_", [INT4, pytest.param(NF4, marks=pytest.mark.thorough)])
def test_a_checkpoint_is_quantised_layer_by_layer(
    qlora: RunConfig, base: str, format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = open_source(base), qlora.model
    specs, mesh = weight_specs(config), build_mesh(qlora.mesh)
    kinds = frozen_dtypes(specs, "bfloat16", format_)
    expected = load_params(source, config, "float32", mesh)
    monkeypatch.setattr("gemma2_jax.checkpoints.store.restore_params", pytest.fail)
    source.__dict__["_params"] = jax.tree.map(np.asarray, expected)
    found = load_params(source, config, kinds, mesh)

    def check(path: str, spec: Any, leaf: Any, weight: Any, kind: Any) -> None:
        assert is_quantised(leaf) == isinstance(kind, Format)
        wanted = stored(weight, spec.dims, kind)
        if is_quantised(leaf):
            np.testing.assert_array_equal(leaf.codes, wanted.codes)
            assert leaf.codes.sharding.spec == weight.sharding.spec
            leaf, wanted = (for_use(each, spec.dims, "float32") for each in (leaf, wanted))
        np.testing.assert_allclose(
            np.asarray(leaf, np.float32), np.asarray(wanted, np.float32), rtol=1e-4, atol=1e-6
        )

    map_specs(check, specs, found, expected, kinds)


def test_values_beyond_float16_are_refused_for_int4(
    qlora: RunConfig, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = open_source(base), qlora.model
    specs, weight = weight_specs(config), source.weight

    def enlarged(place: WeightPlace) -> np.ndarray:
        return weight(place) * np.float32(1e7 if place.path == "pairs/local_block/mlp/up" else 1)

    monkeypatch.setattr(source, "weight", enlarged)
    with pytest.raises(
        UserError,
        match=r"mlp/up has values beyond .* of int4 can hold; choose another format: adaptation.base=nf4",
    ):
        load_params(source, config, frozen_dtypes(specs, "bfloat16", INT4))
    assert is_quantised(
        load_params(source, config, frozen_dtypes(specs, "float32", NF4))["pairs"]["local_block"]["mlp"]["up"]
    )


def test_a_run_is_planned(qlora: RunConfig) -> None:
    topology = find_topology("cpu:1")
    compute = replace(qlora.compute, dtype="bfloat16", remat="full")
    run = replace(qlora, mesh=MeshConfig(1, 1, 1), compute=compute)
    plan = make_plan([run], topology)
    assert plan.parts.base == frozen_bytes(run)
    assert plan.parts.base < 0.6 * frozen_bytes(replace(run, adaptation=LORA))
    assert plan.trained == {run.name: count_weights(divided_specs(LORA, run.model)[0])}
    placed = {model.role: model for model in find_placement([run], topology).models}
    assert sum(weight.device_bytes for weight in placed["base"].weights) == plan.parts.base
    _, line, *_ = describe_runs([run], build_mesh(run.mesh, jax.devices()[:1]))
    assert line.endswith("of all layers, beside a base in nf4")


def test_students_share_a_base_of_the_same_format(qlora: RunConfig, base: str) -> None:
    distill = DistillConfig(base, "float32")
    first = replace(qlora, name="first", objective=KL, distill=distill)
    second = replace(first, name="second", output="second", adaptation=replace(QLORA, rank=2))
    other = replace(first, name="other", output="other", adaptation=replace(QLORA, base="int4"))
    plain = replace(first, name="plain", output="plain", adaptation=LORA)
    students = method_of([first, second, other, plain])
    assert set(students.abstract_frozen(build_mesh(first.mesh))[BASE]) == {"first", "other", "plain"}


def test_an_adapter_is_used_with_the_base_in_full_precision(finished: RunConfig) -> None:
    source: Any = open_source(finished.output)
    assert not any(
        is_quantised(leaf)
        for leaf in jax.tree.leaves(load_params(source, finished.model, "float32"), is_leaf=is_quantised)
    )
