"""The train state: what a step takes and gives back, and what a checkpoint holds."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import abstract_params, init_params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "optimizer", "matching"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        step: int32 scalar, optimizer steps done.
        params: float32, laid out like model/weights.py.
        optimizer: the optimizer's state.
        matching: what training/matching.py adds; None without projections.
    """

    step: Any
    params: dict[str, Any]
    optimizer: Any
    matching: dict[str, Any] | None = None


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without memory: the target of initialisation and restore.

    Raises:
        UserError: the mesh does not divide a weight.
    """
    params = abstract_params(config, mesh=mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=_on_all_devices(mesh))
    return TrainState(step, params, abstract_optimizer(optimizer, params, mesh))


def abstract_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """The state of an optimizer of these abstract parameters.

    Each of its copies of the parameters (its moments) lies on the mesh as the parameters do; left to itself, the
    compiler would give every device all of them.
    """

    def replicated(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on_all_devices(mesh))

    return optax.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=replicated,
    )


def _on_all_devices(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract: TrainState) -> TrainState:
    """The shardings alone, in the same tree."""
    shardings: TrainState = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return shardings


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """A new state with random parameters, each device making its own part of it."""

    def init(key: jax.Array) -> TrainState:
        return _state_at_start(init_params(config, key), optimizer)

    state: TrainState = jax.jit(init, out_shardings=state_shardings(abstract))(jax.random.key(seed))
    return state


def state_from_params(
    params: dict[str, Any], optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """A new state that begins with these parameters, which are used up."""
    begin = partial(_state_at_start, optimizer=optimizer)
    state: TrainState = jax.jit(begin, donate_argnums=0, out_shardings=state_shardings(abstract))(params)
    return state


def _state_at_start(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params))
