"""Training for a format: with every method and on a mesh, resumed, read as the rounded model, exported unchanged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.formats.load import load, load_params, open_source
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.quantised import is_quantised
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.overview import describe_runs
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.parameters import partly_slow
from tests.steps import take_steps
from tests.training.methods import KL, resumed_and_whole

pytestmark = pytest.mark.thorough

Q4_0 = AdaptationConfig("qat", quantize="q4_0")
INT4 = AdaptationConfig("qat", quantize="int4")
TEXT = replace(KL, cross_entropy=1.0, forward_kl=0.0)
NO_TEACHER = DistillConfig(None, "float32")


@pytest.fixture(scope="module")
def source(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(toy_run, vivid(toy_run.model), tmp_path_factory.mktemp("qat") / "source")


@pytest.fixture(scope="module")
def qat(toy_run: RunConfig, source: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("qat") / "run"),
        mesh=MeshConfig(1, 4, 2),
        data=replace(toy_run.data, batch_size=8),
        initialise=InitConfig(source=source),
        adaptation=Q4_0,
        training=replace(toy_run.training, steps=5, eval_every=5),
        checkpoint=replace(toy_run.checkpoint, every=2),
        objective=KL,
        distill=DistillConfig(source, "float32"),
    )


@pytest.fixture(scope="module")
def finished(qat: RunConfig) -> RunConfig:
    train(qat)
    return qat


def test_an_export_has_the_values_of_the_trained_forward_pass(finished: RunConfig, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = open_source(finished.output)
    convert(finished.output, tmp_path / "model.gguf", dtype="q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, entry in expand(GGUF, weight_specs(source.config)).items():
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(entry.shape)
        np.testing.assert_array_equal(values, entry.join([source.weight(entry.places[0])]), err_msg=name)


def test_the_rounded_model_is_what_was_validated(finished: RunConfig, source: str) -> None:
    """It loses what rounding costs: training has a loss from the first step, though the teacher is its own source."""
    rows = read_metrics(finished.output)
    assert rows[0]["loss"] > 1e-4
    validation = next(row for row in reversed(rows) if row["split"] == "validation")
    found = evaluate_run(finished.output, source)
    assert found.kl == pytest.approx(validation["kl"], rel=1e-4)
    assert found.kl is not None
    assert found.kl > 1e-4


def test_int4_is_loaded_in_four_bits_unchanged(qat: RunConfig, tmp_path: Path) -> None:
    run = replace(qat, output=str(tmp_path / "run"), adaptation=INT4)
    train(run)
    arrays, _ = load(run.output)
    model, _ = load(run.output, quantize="int4")
    assert any(map(is_quantised, jax.tree.leaves(model.params(), is_leaf=is_quantised)))
    tokens = jnp.arange(24).reshape(2, 12)
    np.testing.assert_allclose(model(tokens), arrays(tokens), atol=1e-4)


@partly_slow("method", ("text", "cached", "on-policy"), kept=("cached",))
def test_every_method_trains_for_a_format_and_is_resumed(
    finished: RunConfig, method: str, source: str, tmp_path: Path
) -> None:
    text = replace(finished, objective=TEXT, distill=NO_TEACHER, output=str(tmp_path / "text"))
    if method == "text":
        train(text)
    resumed, _ = resumed_and_whole(text, method, source, tmp_path)
    plain = load_params(open_source(source), resumed.model, "float32")
    trained, _ = load(resumed.output)
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max(), plain, trained.params())
    assert all(change > 0 for change in jax.tree.leaves(moved))


@pytest.mark.parametrize("adaptation", [Q4_0, INT4], ids=["q4_0", "int4"])
def test_a_mesh_takes_the_steps_of_one_device(qat: RunConfig, adaptation: AdaptationConfig) -> None:
    """Up to rounding: a weight between two levels may get either."""
    run = replace(qat, adaptation=adaptation, objective=TEXT, distill=NO_TEACHER)
    batch = next(train_batches(run.data))
    found = [
        take_steps(replace(run, mesh=mesh), build_mesh(mesh, devices), [batch])[1][0]
        for mesh, devices in (
            (MeshConfig(1, 1, 1), jax.devices()[:1]),
            (MeshConfig(1, 4, 2), jax.devices()),
        )
    ]
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_the_format_and_what_it_cannot_hold_are_shown(qat: RunConfig) -> None:
    run = replace(qat, model=replace(qat.model, d_ff=72))
    _, line, other, *_ = describe_runs([run], build_mesh(run.mesh))
    assert line.endswith("trained as q4_0 rounds it")
    assert other.endswith("in float16: mlp/down (72)")


@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_a_quantised_teacher_teaches_nearly_the_same(qat: RunConfig, source: str, format_: Any) -> None:
    run = replace(
        qat, adaptation=AdaptationConfig(), distill=DistillConfig(source, "float32", quantize=format_)
    )
    run = replace(run, mesh=MeshConfig(1, 1, 1))
    mesh = build_mesh(run.mesh, jax.devices()[:1])
    teacher = build_method(run).load_frozen(_tokenizer(run), mesh)["teacher"]
    expected = build_method(run).abstract_frozen(mesh)["teacher"]
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(teacher)] == shapes
    batches = [next(train_batches(run.data))]
    _, (row,) = take_steps(replace(run, initialise=InitConfig()), mesh, batches, teacher)
    _, (plain,) = take_steps(
        replace(run, initialise=InitConfig(), distill=DistillConfig(source, "float32")),
        mesh,
        batches,
        load(source)[0],
    )
    assert row["loss"] == pytest.approx(plain["loss"], rel=0.05)
    assert row["loss"] != plain["loss"]


def _tokenizer(run: RunConfig) -> Any:
    assert run.distill.teacher is not None
    return load(run.distill.teacher)[1]


def test_only_a_teacher_in_the_step_can_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.quantize is int8, but distill.teacher is null"):
        DistillConfig(None, "float32", quantize="int8")
    with pytest.raises(UserError, match=r"int4, but distill.cache holds a teacher's outputs"):
        DistillConfig("teacher", "float32", cache=str(tmp_path), quantize="int4")
