"""The training step and the evaluation step, the same for every method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.methods.method import Frozen, Method
from gemma2_jax.model.weights import constrain_params
from gemma2_jax.sharding.layout import LayoutConfig, laid_out
from gemma2_jax.training.state import UpdateRule, shardings


def build_train_step(
    method: Method, update: UpdateRule, abstract: Any, layout: LayoutConfig, accumulation: int = 1
) -> Wrapped:
    """Builds the jitted `step(state, frozen, batch) -> (state, metrics)`, which donates the state it is given.

    The metrics are those of `update`.

    Args:
        abstract: the state's shapes, dtypes and shardings.
        layout: layout of activations and gradients on the mesh.
        accumulation: number of microbatches that each batch is split into.
    """

    def step(state: Any, frozen: Frozen, batch: Batch) -> tuple[Any, dict[str, Any]]:
        trainable, number = update.trainable(state), update.step(state)

        def loss(trainable: Any, batch: Batch) -> tuple[jax.Array, Any]:
            return method.loss(trainable, frozen, batch, number)

        def gradients(batch: Batch) -> tuple[Any, Any]:
            found, sums = jax.grad(loss, has_aux=True)(trainable, batch)
            return constrain_params(found, method.specs), sums

        found, sums = _accumulate(gradients, method.specs, accumulation, batch)
        return update(state, found, sums, method.rates(number))

    def step_as_laid_out(*arguments: Any) -> tuple[Any, dict[str, Any]]:
        with laid_out(layout):
            return step(*arguments)

    return jax.jit(step_as_laid_out, donate_argnums=0, out_shardings=(shardings(abstract), None))


def build_evaluation_step(method: Method) -> Wrapped:
    """Builds the jitted `step(trainable, frozen, batch) -> sums`, see `Method.evaluate`."""
    return jax.jit(method.evaluate)


def _accumulate(
    gradients: Callable[[Batch], tuple[Any, Any]], specs: Any, microbatches: int, batch: Batch
) -> tuple[Any, Any]:
    """Sums gradients and metrics over the microbatches of a batch, with one microbatch in memory at a time."""
    if microbatches == 1:
        return gradients(batch)

    def split(x: jax.Array) -> jax.Array:
        # Every microbatch takes rows from each device's shard, so the sharding of the batch axis does not change.
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def body(sums: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradients(microbatch)), None

    split_rows = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split_rows))
    grads, metrics = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    sums, _ = jax.lax.scan(body, (constrain_params(grads, specs), metrics), split_rows)
    return sums
