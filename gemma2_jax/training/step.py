"""The one training step, for every objective, and the evaluation step beside it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.distill.matching import PROJECTIONS, match_sums
from gemma2_jax.distill.teacher import DistillConfig, as_teacher
from gemma2_jax.kernels.lm_head import Coefficients, LMHead, SparseTargets, Teacher, blockwise_loss
from gemma2_jax.model.capture import Capture, CapturedLayer, hidden_and_captured
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import map_weights
from gemma2_jax.objectives.objective import build_coefficients, evaluation_loss, token_loss
from gemma2_jax.sharding.layout import constrain, constrain_weight, laid_out
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.matching import update_matching
from gemma2_jax.training.state import TrainState, state_shardings

Layers = dict[int, CapturedLayer]


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "layers"], meta_fields=[])
@dataclass(frozen=True)
class Reading:
    """What a teacher's forward pass over a batch gave, for the steps of any students. A pytree.

    Attributes:
        hidden: [B, T, D], its final hidden states.
        layers: those that any of the students matches, by their number.
    """

    hidden: jax.Array
    layers: Layers


# What a teacher has said about a batch: all that it read, a few entries of its distributions, or, with None, nothing
# yet.
Taught = Reading | SparseTargets | None
Trained = tuple[dict[str, Any], jax.Array | None]  # the parameters, and the projections of matching


def build_train_step(
    config: RunConfig, optimizer: optax.GradientTransformation, abstract: TrainState
) -> Wrapped:
    """Compile-once `step(state, teacher, batch, taught=None) -> (state, metrics)`; the state given in is used up.

    `taught` is what a teacher has said about the batch before, see `Taught`; without it, the teacher reads the batch.

    Metrics are averages over the batch's targets (`loss`, `cross_entropy`, and each other term of the objective,
    `kl` for the forward one), those of distill.match (`match_hidden`, `match_attention`), `gradient_norm` of the
    parameters before clipping, what the objective schedules (`temperature`, `mix`), and `tokens`, the number of
    targets.
    """
    loss = token_loss(config.objective)
    coefficients_at = build_coefficients(config.objective, config.training.steps)
    teacher_compute = _teacher_compute(config.compute, config.distill)
    match = config.distill.match
    of_student, of_teacher = (None, None) if match is None else (match.of_student, match.of_teacher)

    def sums(
        trained: Trained, coefficients: Coefficients, teacher: Gemma2 | None, batch: Batch, taught: Taught
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, projections = trained
        student_head, own_layers = _read(Gemma2(config.model, params), batch, config.compute, of_student)
        with jax.named_scope("teacher"), as_teacher(config.distill):
            said = _listen(teacher, batch, taught, teacher_compute, of_teacher)
            signal, its_layers = jax.lax.stop_gradient(said)
        with jax.named_scope("loss"):
            total, metrics = blockwise_loss(
                loss,
                student_head,
                signal if config.objective.needs_teacher else None,
                batch.targets,
                batch.loss_mask,
                config.objective.block_tokens,
                coefficients,
            )
        if match is not None:
            with jax.named_scope("match"):
                matched, distances = match_sums(match, projections, own_layers, its_layers, batch)
            total, metrics = total + matched, metrics | distances
        return total, {"loss": total, **metrics, "tokens": jnp.sum(batch.loss_mask)}

    def gradients(
        trained: Trained, coefficients: Coefficients, teacher: Gemma2 | None, batch: Batch, taught: Taught
    ) -> tuple[Trained, dict[str, jax.Array]]:
        grads, metrics = jax.grad(sums, has_aux=True)(trained, coefficients, teacher, batch, taught)
        return _constrain_trained(grads), metrics

    def step(
        state: TrainState, teacher: Gemma2 | None, batch: Batch, taught: Taught = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        coefficients = coefficients_at(state.step)
        trained = (state.params, None if state.matching is None else state.matching["projections"])
        grads, totals = _accumulate(
            partial(gradients, trained, coefficients, teacher),
            config.training.accumulation,
            (batch, taught),
        )
        tokens = jnp.maximum(totals.pop("tokens"), 1.0)
        grads, projection_grads = jax.tree.map(lambda grad: grad / tokens, grads)
        metrics = {name: total / tokens for name, total in totals.items()}
        metrics |= {name: coefficients[name] for name in config.objective.schedules}
        metrics |= {"tokens": tokens, "gradient_norm": optax.tree.norm(grads)}
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            matching = update_matching(config, state.matching, projection_grads)
        return TrainState(state.step + 1, params, optimizer_state, matching), metrics

    def step_as_laid_out(*arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with laid_out(config.layout):
            return step(*arguments)

    return jax.jit(step_as_laid_out, donate_argnums=0, out_shardings=(state_shardings(abstract), None))


def build_evaluation_step(compute: ComputeConfig, distill: DistillConfig, block_tokens: int) -> Wrapped:
    """Compile-once `step(model, teacher, batch) -> sums` of the metrics over the batch's targets, and `tokens`."""
    compute = replace(compute, remat="none")
    teacher_compute = _teacher_compute(compute, distill)

    def step(model: Gemma2, teacher: Gemma2 | None, batch: Batch) -> dict[str, jax.Array]:
        head = _head(model, batch, compute)
        with as_teacher(distill):
            teacher_head = None if teacher is None else _head(teacher, batch, teacher_compute)
        _, metrics = blockwise_loss(
            evaluation_loss, head, teacher_head, batch.targets, batch.loss_mask, block_tokens
        )
        return {**metrics, "tokens": jnp.sum(batch.loss_mask)}

    return jax.jit(step)


def build_reading(compute: ComputeConfig, distill: DistillConfig, capture: Capture | None) -> Wrapped:
    """Compile-once `read(teacher, batch) -> Reading`: one forward pass of the teacher, for the steps of any students.

    Args:
        distill: of any of the students, whose teacher is the same.
        capture: what serves all students that match layers; None if none does.
    """
    teacher_compute = _teacher_compute(compute, distill)

    def read(teacher: Gemma2, batch: Batch) -> Reading:
        with jax.named_scope("teacher"), as_teacher(distill):
            head, layers = _read(teacher, batch, teacher_compute, capture)
            return Reading(constrain(head.hidden, "BTD"), layers)

    return jax.jit(read)


def _listen(
    teacher: Gemma2 | None, batch: Batch, taught: Taught, compute: ComputeConfig, capture: Capture | None
) -> tuple[Teacher, Layers]:
    """The teacher's signal, and its layers, `capture`'s at least."""
    if isinstance(taught, SparseTargets):
        return taught, {}
    if teacher is None:
        return None, {}
    if taught is None:
        return _read(teacher, batch, compute, capture)
    return _head_on(teacher, taught.hidden), taught.layers


def _read(
    model: Gemma2, batch: Batch, compute: ComputeConfig, capture: Capture | None
) -> tuple[LMHead, Layers]:
    if capture is None:
        return _head(model, batch, compute), {}
    hidden, layers = hidden_and_captured(
        model, batch.tokens, batch.positions, batch.segment_ids, compute, capture
    )
    return _head_on(model, hidden), layers


def _head(model: Gemma2, batch: Batch, compute: ComputeConfig) -> LMHead:
    return _head_on(model, model.hidden(batch.tokens, batch.positions, batch.segment_ids, compute))


def _head_on(model: Gemma2, hidden: jax.Array) -> LMHead:
    config = model.config
    embedding = model.embedder.embedding[...]
    return LMHead(hidden, embedding, config.final_logit_softcap, config.vocab_padding)


def _teacher_compute(compute: ComputeConfig, distill: DistillConfig) -> ComputeConfig:
    """A forward pass alone keeps nothing, so there is nothing for it to recompute."""
    return replace(compute, dtype=distill.dtype, remat="none")


def _accumulate(
    gradients: Callable[..., tuple[Any, dict[str, jax.Array]]], microbatches: int, rows: tuple[Any, ...]
) -> tuple[Any, dict[str, jax.Array]]:
    """Sums of gradients and metrics over microbatches of `rows`, arrays [B, ...], one after another in memory."""
    if microbatches == 1:
        return gradients(*rows)

    def split(x: jax.Array) -> jax.Array:
        # Every microbatch takes rows from each device's share: the batch axis stays split as it is.
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def body(sums: Any, microbatch: tuple[Any, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradients(*microbatch)), None

    split_rows = jax.tree.map(split, rows)
    shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], split_rows))
    grads, metrics = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    sums, _ = jax.lax.scan(body, (_constrain_trained(grads), metrics), split_rows)
    return sums


def _constrain_trained(grads: Trained) -> Trained:
    """Gradients lie where their parameters do: with fsdp, each device sums up only its own part."""
    params, projections = grads
    if projections is not None:
        projections = constrain_weight(projections, PROJECTIONS.dims)
    dims = map_weights(lambda _, weight: weight.dims)
    return jax.tree.map(constrain_weight, params, dims), projections
