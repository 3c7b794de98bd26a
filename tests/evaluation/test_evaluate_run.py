"""Evaluation against an independent computation from all logits."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import load_model
from gemma2_jax.config import UserError, save_config
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("runs") / "run"),
        mesh=MeshConfig(4, 1, 2),
        training=replace(toy_run.training, steps=3),
    )
    train(config)
    return config


@pytest.mark.thorough
def test_equals_the_mean_over_every_target(finished: RunConfig) -> None:
    model = load_model(finished.output)
    total, entropy, count = 0.0, 0.0, 0
    for batch in validation_batches(finished.data):
        logits = model(
            jnp.asarray(batch.tokens), jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
        )
        log_probabilities = np.asarray(jax.nn.log_softmax(logits), np.float64)
        real = np.asarray(batch.segment_ids) > 0
        total -= np.take_along_axis(log_probabilities, np.asarray(batch.targets)[..., None], -1)[..., 0][
            real
        ].sum()
        entropy -= (np.exp(log_probabilities) * log_probabilities).sum(-1)[real].sum()
        count += real.sum()
    found = evaluate_run(finished.output)
    assert found.cross_entropy == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found.entropy == pytest.approx(entropy / count, rel=1e-5)
    assert (found.agreement, found.kl, found.teacher_entropy) == (None, None, None)
    assert found.tokens_seen == 3 * 4 * 32
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(model.params()))
    logged = read_metrics(finished.output)[-1]
    assert logged["cross_entropy"] == pytest.approx(found.cross_entropy, rel=1e-6)
    assert logged["targets"] == count


@pytest.mark.thorough
def test_evaluations_in_training_are_bounded_and_the_final_one_is_not(
    finished: RunConfig, tmp_path: Path
) -> None:
    config = replace(
        finished, output=str(tmp_path / "run"), training=replace(finished.training, eval_batches=1)
    )
    train(config)
    whole, sample = (read_metrics(run.output)[-1] for run in (finished, config))
    assert sample["targets"] == 4 * 32 < whole["targets"]
    assert sample["cross_entropy"] != whole["cross_entropy"]
    assert evaluate_run(config.output) == evaluate_run(finished.output)


def test_a_run_agrees_with_itself(finished: RunConfig) -> None:
    found = evaluate_run(finished.output, finished.output)
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.teacher_entropy == found.entropy


def test_a_run_that_was_never_trained(finished: RunConfig, tmp_path: Path) -> None:
    save_config(finished, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="holds no checkpoint; expected one in"):
        evaluate_run(tmp_path)


def test_what_is_not_a_run_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    for folder, file, text in (
        ("hf", "config.json", "{}"),
        ("peft", "adapter_config.json", "{}"),
        ("run", "config.yaml", "model:\n  num_layers: 2\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    needs = (
        "g2.evaluate_run needs a run folder of `gemma2 train`, whose config.yaml names the validation data"
    )
    inside = Path(finished.output, "checkpoints")
    for path, message in {
        tmp_path / "hf": f"has no config.yaml; {needs}; to evaluate a model on text: "
        f"`gemma2 eval {tmp_path}/hf --text FILE`.",
        tmp_path / "run": f"holds a converted model; {needs}; to evaluate a model on text: "
        f"`gemma2 eval {tmp_path}/run --text FILE`.",
        tmp_path
        / "peft": f"has no config.yaml; {needs}; to measure this adapter, give its base model's run and "
        f"adapter_folder={tmp_path}/peft.",
        tmp_path / "nowhere": f"is not a folder; {needs}.",
        inside: f"has no config.yaml; {needs}; give {finished.output}.",
    }.items():
        with pytest.raises(UserError) as error:
            evaluate_run(path)
        assert str(error.value) == f"{path} {message}"


@pytest.mark.thorough
def test_an_adapter_is_evaluated_with_its_base(finished: RunConfig, tmp_path: Path) -> None:
    """The same numbers as at the last step of training, also as an adapter given for the base."""
    lora = replace(
        finished,
        output=str(tmp_path / "lora"),
        initialise=InitConfig(source=finished.output),
        adaptation=AdaptationConfig("lora", 4, 16.0, targets=("q", "up"), dropout=0.1),
    )
    train(lora)
    (last,) = [row for row in read_metrics(lora.output) if row["split"] == "validation"]
    found = evaluate_run(lora.output, finished.output)
    assert found.cross_entropy == pytest.approx(last["cross_entropy"], rel=1e-5)
    assert found.kl is not None
    assert found.kl > 1e-4
    given = evaluate_run(finished.output, adapter_folder=lora.output)
    assert given.cross_entropy == pytest.approx(found.cross_entropy, rel=1e-6)
    as_teacher = evaluate_run(finished.output, lora.output)  # merged
    assert as_teacher.teacher_entropy == pytest.approx(found.entropy, rel=1e-4)
