"""A method that the package does not have is trained, validated, stopped, resumed and planned like its own methods."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.kernels.lm_head import lm_head_sums
from gemma2_jax.methods.language_modelling import LanguageModelling, evaluation_sums
from gemma2_jax.methods.method import Frozen, Trainable
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Weight
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from tests.training.stops import stopped_after

pytestmark = pytest.mark.usefixtures("one_device")

HEAD = "after_next"


class TokenAfterNext(LanguageModelling):
    """Predicts the token after the next one, from hidden states that a matrix of its own transforms."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        D = config.model.d_model
        self.specs[HEAD] = {"matrix": Weight("DE", (D, D), fan_in="D")}

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        head, shifted = self._parts(trainable, frozen, batch, step)
        total, metrics = lm_head_sums(
            self.terms,
            {"student": head},
            {"targets": shifted.targets},
            shifted.loss_mask,
            self.config.objective.block_tokens,
            self.coefficients(step),
        )
        return total, {"loss": total, **metrics, "targets": jnp.sum(shifted.loss_mask)}

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        head, shifted = self._parts(trainable, frozen, batch, None)
        return evaluation_sums({"student": head}, shifted, self.config.objective.block_tokens)

    def _parts(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array | None) -> Any:
        head, _ = self.forward(trainable, frozen, batch, step)
        head = replace(head, hidden=head.hidden @ trainable[HEAD]["matrix"].astype(head.hidden.dtype))
        goes_on = batch.segment_ids == jnp.roll(batch.segment_ids, -1, axis=1)
        mask = (batch.loss_mask * jnp.roll(batch.loss_mask, -1, axis=1) * goes_on).at[:, -1].set(0)
        return head, replace(batch, targets=jnp.roll(batch.targets, -1, axis=1), loss_mask=mask)


@pytest.fixture(scope="module")
def run(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return replace(toy_run, output=str(tmp_path_factory.mktemp("own") / "whole"))


@pytest.fixture(scope="module")
def trained(run: RunConfig) -> RunConfig:
    train(run, TokenAfterNext(run))
    return run


def rows(run: RunConfig, split: str) -> list[dict[str, float]]:
    found = [row for row in read_metrics(run.output) if row["split"] == split]
    return [
        {key: value for key, value in row.items() if key not in ("tokens_per_second", "seconds", "mfu")}
        for row in found
    ]


def test_it_trains_and_is_validated(trained: RunConfig) -> None:
    logged, validated = rows(trained, "train"), rows(trained, "validation")
    assert logged[-1]["step"] == validated[-1]["step"] == trained.training.steps
    assert logged[-1]["loss"] < logged[0]["loss"]
    # Of each document's part of a row, one target fewer than in language modelling.
    expected = 0
    for batch in validation_batches(trained.data):
        for row in batch.segment_ids:
            expected += np.sum(row > 0) - len(set(row) - {0})
    assert validated[-1]["targets"] == expected
    assert validated[-1]["perplexity"] == pytest.approx(np.exp(validated[-1]["cross_entropy"]))
    load_model(trained.output)  # a run folder like any other


@pytest.mark.thorough
def test_it_goes_on_as_if_it_had_not_been_stopped(trained: RunConfig, tmp_path: Path) -> None:
    every_two = replace(trained.checkpoint, every=2)
    stopped = replace(trained, output=str(tmp_path / "stopped"), checkpoint=every_two)
    with stopped_after(4):
        train(stopped, TokenAfterNext(stopped))
    train(stopped, TokenAfterNext(stopped))
    for split in ("train", "validation"):
        assert rows(stopped, split) == rows(trained, split)
    chosen = [jax.tree.leaves(load_model(each.output).params()) for each in (trained, stopped)]
    for one, other in zip(*chosen, strict=True):
        np.testing.assert_array_equal(one, other)


def begun(run: RunConfig, folder: Path) -> RunConfig:
    """A copy of a finished run that has lost its last checkpoint."""
    shutil.copytree(run.output, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    return replace(run, output=str(folder))


def test_a_checkpoint_of_another_method_is_refused(trained: RunConfig, tmp_path: Path) -> None:
    own = begun(trained, tmp_path / "own")
    with pytest.raises(UserError) as error:
        train(own)
    assert str(error.value) == (
        f"{own.output}/checkpoints/6 was trained by another method: it holds after_next, optimizer and params, but "
        f"this run needs optimizer and params; choose another output, or delete {own.output} to train again."
    )
    assert latest_step(own.output) == 6


def test_it_is_planned(run: RunConfig) -> None:
    topology = find_topology("cpu:1")
    own, plain = make_plan([run], topology, TokenAfterNext(run)), make_plan([run], topology)
    D = run.model.d_model
    # The matrix and its two moments, and two numbers more that count the optimizer's steps.
    more = own.program.memory.argument - plain.program.memory.argument
    assert 3 * 4 * D * D <= more <= 3 * 4 * D * D + 64


class SmallStates(LanguageModelling):
    """Has no distribution over tokens: trains the hidden states to be small, on reversed rows in every second step."""

    def collects(self, step: int) -> bool:
        return step % 2 == 1

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        return replace(batch, tokens=batch.tokens[:, ::-1])

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        found = self.evaluate(trainable, frozen, batch)
        return found["square"], {"loss": found["square"], **found}

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        model = Gemma2(self.config.model, trainable["params"])
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids, self.config.compute)
        square = jnp.sum(jnp.mean(jnp.square(hidden), axis=-1) * batch.loss_mask)
        return {"square": square, "targets": jnp.sum(batch.loss_mask)}


def test_a_method_without_cross_entropy_reports_its_own_metrics(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = replace(run.training, steps=3, log_every=1, eval_every=3)
    own = replace(run, output=str(tmp_path / "small"), training=training)
    train(own, SmallStates(own))
    logged, (validated,) = rows(own, "train"), rows(own, "validation")
    assert set(validated) == {"step", "split", "square", "targets"}
    assert logged[-1]["square"] == logged[-1]["loss"] < logged[0]["loss"]
    assert f"step 3/3  validation square {validated['square']:.4f}  0 s left" in capsys.readouterr().err
    assert latest_step(own.output) == 3


def test_a_plan_names_the_program_that_makes_a_methods_batches(run: RunConfig) -> None:
    topology = find_topology("cpu:1")
    (left_out,) = make_plan([run], topology, SmallStates(run)).to_dict()["not_planned"]
    assert left_out.startswith("program that makes batches")
