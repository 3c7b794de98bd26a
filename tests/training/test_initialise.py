"""Runs initialised from the weights of another kind of checkpoint."""

from dataclasses import replace

import jax
import pytest

from gemma2_jax.checkpoints.store import load_model
from gemma2_jax.config import UserError
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import train_tokenizer
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.formats.convert import convert
from gemma2_jax.methods.choose import build_method
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.step import build_evaluation_step


@pytest.fixture(scope="module")
def sharded(toy_run):
    return replace(toy_run, mesh=MeshConfig(1, 4, 2), optimizer=replace(toy_run.optimizer, warmup_steps=1))


@pytest.fixture(scope="module")
def released(sharded, tmp_path_factory):
    """A trained run and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("released")
    train(
        replace(
            sharded, output=str(folder / "run"), training=replace(sharded.training, steps=3, eval_every=3)
        )
    )
    convert(folder / "run", folder / "hf")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["run", "hf"])
def test_the_first_loss_is_that_of_the_weights(sharded, released, tmp_path, kind):
    mesh = build_mesh(sharded.mesh)
    with jax.set_mesh(mesh):
        model = load_model(released / "run", mesh=mesh)
        batch = on_mesh(next(train_batches(sharded.data)), mesh)
        sums = build_evaluation_step(build_method(sharded))({"params": model.params()}, {}, batch)
    config = replace(
        sharded,
        output=str(tmp_path / "continued"),
        training=replace(sharded.training, steps=2, eval_every=2),
        initialise=InitConfig(str(released / kind)),
    )
    train(config)
    first = read_metrics(config.output)[0]
    assert first["loss"] == pytest.approx(float(sums["cross_entropy"] / sums["targets"]), rel=1e-5)


@pytest.mark.thorough
def test_a_teacher_of_another_kind(sharded, released, tmp_path):
    """A student initialised as its teacher starts with a loss of zero."""
    config = replace(
        sharded,
        output=str(tmp_path / "student"),
        objective=ObjectiveConfig(0.0, 1.0, 1.0, 48),
        distill=DistillConfig(str(released / "hf"), "float32"),
        training=replace(sharded.training, steps=1, eval_every=1),
        initialise=InitConfig(str(released / "run")),
    )
    train(config)
    assert abs(read_metrics(config.output)[0]["kl"]) < 1e-6


@pytest.mark.thorough
def test_another_model_or_tokenizer_is_refused(sharded, released, texts, tmp_path):
    given = InitConfig(str(released / "hf"))
    with pytest.raises(
        UserError, match=r"hf has d_ff 64, but model.d_ff is 72; choose a source that has at least"
    ):
        train(
            replace(
                sharded,
                output=str(tmp_path / "a"),
                initialise=given,
                model=replace(sharded.model, d_ff=72),
            )
        )
    folder = tmp_path / "other"
    convert(released / "run", folder, "run")
    train_tokenizer(texts[:60], folder / "tokenizer.model", 400)
    with pytest.raises(
        UserError, match=r"^initialise.source .* of 400 tokens, but tokenizer.path is .* same"
    ):
        train(replace(sharded, output=str(tmp_path / "b"), initialise=InitConfig(str(folder))))


@pytest.mark.thorough
def test_a_student_cut_by_importance(sharded, released, tmp_path):
    """It starts better than a random student, and a resumed run records what it was initialised from."""
    narrow = replace(sharded.model, d_ff=48, num_heads=2)
    short = replace(sharded.training, steps=2, eval_every=2)
    config = replace(sharded, model=narrow, training=short, output=str(tmp_path / "random"))
    train(config)
    cut = replace(
        config,
        output=str(tmp_path / "cut"),
        initialise=InitConfig(str(released / "run"), width="importance", batches=2),
    )
    train(cut)
    random, better = (read_metrics(run.output)[0]["loss"] for run in (config, cut))
    assert better < random - 0.2
    before = read_metrics(cut.output)
    train(cut)
    assert read_metrics(cut.output) == before
    with pytest.raises(UserError, match=r"initialise.batches=2, but .* is now 3"):
        train(replace(cut, initialise=replace(cut.initialise, batches=3)))
