"""A method that the package does not have is trained, validated, stopped, resumed and planned like its own methods."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.data.shards import find_data_manifest
from gemma2_jax.methods.language_modelling import LanguageModelling, evaluation_sums, loss_sums
from gemma2_jax.methods.method import Frozen, Trainable
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Weight
from gemma2_jax.planning.plan import make_plan, plan
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.start import check_same_method
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
        block_tokens = self.config.objective.block_tokens
        total, metrics = loss_sums(
            self.terms, {"model": head}, shifted, block_tokens, self.coefficients(step)
        )
        return total, {"loss": total, **metrics, "targets": jnp.sum(shifted.loss_mask)}

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        head, shifted = self._parts(trainable, frozen, batch, None)
        return evaluation_sums({"model": head}, shifted, self.config.objective.block_tokens)

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


def forget_method(run: RunConfig) -> None:
    """Makes the run's newest checkpoint one of an older version, which does not name the method."""
    folder = Path(run.output, "checkpoints", str(latest_step(run.output)))
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["custom_metadata"]["method"]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))


def test_a_checkpoint_of_another_method_is_refused(trained: RunConfig, tmp_path: Path) -> None:
    own = begun(trained, tmp_path / "own")
    for method, name in (
        (None, "the method that its configuration selects"),
        (SmallStates(own), "the method SmallStates"),
    ):
        with pytest.raises(UserError) as refused:
            train(own, method)
        assert str(refused.value) == (
            f"{own.output} was trained with the method TokenAfterNext, but this run has {name}; give g2.train the "
            f"same method, choose another output, or delete {own.output} to train again."
        )
    forget_method(own)
    with pytest.raises(UserError) as error:
        train(own)
    assert str(error.value) == (
        f"{own.output}/checkpoints/6 was trained by another method: it holds after_next, optimizer and params, but "
        f"this run needs optimizer and params; choose another output, or delete {own.output} to train again."
    )
    assert latest_step(own.output) == 6


def test_methods_with_the_same_trees_do_not_resume_each_other(trained: RunConfig, tmp_path: Path) -> None:
    """`Similar` has the trees of `TokenAfterNext`; so have checkpoints of older versions, which name no method."""
    own = begun(trained, tmp_path / "own")
    with pytest.raises(
        UserError, match="with the method TokenAfterNext, but this run has the method Similar;"
    ):
        train(own, Similar(own))
    forget_method(own)
    check_same_method(own, Similar(own))


def test_a_method_built_from_another_configuration_is_refused(run: RunConfig, tmp_path: Path) -> None:
    other = replace(run, model=replace(run.model, num_layers=4))
    message = (
        f"the method was built from a configuration with model.num_layers={run.model.num_layers}, but the run has "
        "model.num_layers=4; build it from the run's, as in g2.train(config, TokenAfterNext(config))."
    )
    for use in (train, lambda config, method: plan(config, "cpu:1", method)):
        with pytest.raises(UserError) as error:
            use(other, TokenAfterNext(run))
        assert str(error.value) == message


def test_a_method_for_more_tokens_than_the_text_supports_is_refused(run: RunConfig, tmp_path: Path) -> None:
    found = find_data_manifest(run.data.folder)
    assert found is not None
    shutil.copytree(run.data.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").write_text(json.dumps(to_dict(replace(found, vocabulary_full=True))))
    tokens = found.vocab_size
    asked = replace(
        run, data=replace(run.data, folder=str(tmp_path)), tokenizer=replace(run.tokenizer, vocab_size=4096)
    )
    with pytest.raises(UserError) as error:
        train(asked, TokenAfterNext(asked))
    assert str(error.value) == (
        f"tokenizer.vocab_size is 4096, but the text in data.folder {tmp_path} supports at most {tokens}; set it to "
        f"{tokens} before you build the method."
    )


def test_it_is_planned(run: RunConfig) -> None:
    topology = find_topology("cpu:1")
    own, plain = make_plan([run], topology, TokenAfterNext(run)), make_plan([run], topology)
    D = run.model.d_model
    # The matrix and its two moments, and two numbers more that count the optimizer's steps.
    more = own.program.memory.argument - plain.program.memory.argument
    assert 3 * 4 * D * D <= more <= 3 * 4 * D * D + 64


class Similar(TokenAfterNext):
    """Another method with the same trained trees."""


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
