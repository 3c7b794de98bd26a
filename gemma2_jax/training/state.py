"""The train state, its initialisation, and the update that a step applies to it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax.methods.method import BASE, PARAMS, ModelMethod
from gemma2_jax.model.quantised import is_quantised, storage_of, stored
from gemma2_jax.model.weights import (
    Params,
    Weight,
    abstract_params,
    init_params,
    map_specs,
    specs_by_path,
    weight_specs,
)
from gemma2_jax.run import RunConfig
from gemma2_jax.training.optimizer import build_optimizer


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "optimizer", "averaged"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        step: number of optimizer steps done, int32 scalar.
        trainable: trees that a method trains, by name; float32.
        optimizer: optimizer state of each tree, by the same names.
        averaged: exponential moving averages of the trees over the steps, by the same names; float32. Empty without
            `training.ema`.
    """

    step: Any
    trainable: dict[str, Any]
    optimizer: dict[str, Any]
    averaged: dict[str, Any]


class UpdateRule(Protocol):
    """Applies the gradients of a step to the state of one run or of several."""

    def abstract_state(self, mesh: Mesh) -> Any:
        """Shapes, dtypes and shardings of a state, without allocating it."""

    def trainable(self, state: Any) -> Any:
        """The part of the state that gradients are computed for."""

    def averaged(self, state: Any) -> Any | None:
        """The averages of the weights, structured like `trainable`; None if the state has none."""

    def step(self, state: Any) -> jax.Array:
        """Number of steps done, int32."""

    def __call__(
        self, state: Any, gradients: Any, sums: Mapping[str, Any], rates: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the state after a step and the step's metrics, see `Update`. Traced."""


class Update:
    """The update rule of one run: computes the next state from a batch's gradients.

    Moments, weight decay and clipping are separate for each trained tree.

    Args:
        specs: specs of the trained trees, by name.
    """

    def __init__(self, config: RunConfig, specs: Mapping[str, Any]) -> None:
        self.specs, self._ema = specs, config.training.ema
        self._optimizers = {
            name: build_optimizer(config.optimizer, config.training.steps, tree)
            for name, tree in specs.items()
        }

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state, without arrays: the target of initialisation and restore.

        Raises:
            UserError: the mesh does not divide a weight.
        """
        trainable = {name: abstract_params(tree, mesh=mesh) for name, tree in self.specs.items()}
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=_on_all_devices(mesh))
        optimizer = {
            name: _abstract_optimizer(rule, trainable[name], mesh) for name, rule in self._optimizers.items()
        }
        return TrainState(step, trainable, optimizer, {} if self._ema is None else trainable)

    def begin(self, trainable: dict[str, Any]) -> TrainState:
        """The state before the first step. Traced."""
        optimizer = {name: rule.init(trainable[name]) for name, rule in self._optimizers.items()}
        # Copies, since a step donates the weights and their averages.
        averaged = {} if self._ema is None else jax.tree.map(jnp.copy, trainable)
        return TrainState(jnp.int32(0), trainable, optimizer, averaged)

    def trainable(self, state: TrainState) -> dict[str, Any]:
        """The part of the state that gradients are computed for."""
        return state.trainable

    def averaged(self, state: TrainState) -> dict[str, Any] | None:
        """The averages of the weights, structured like `trainable`; None without `training.ema`."""
        return state.averaged or None

    def step(self, state: TrainState) -> jax.Array:
        """Number of steps done, int32."""
        step: jax.Array = state.step
        return step

    def __call__(
        self, state: TrainState, gradients: dict[str, Any], sums: Mapping[str, Any], rates: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after a step and the step's metrics. Traced.

        A step whose loss or gradients are not finite leaves the state unchanged.

        Args:
            gradients: gradients summed over the batch's targets, one tree for each of `specs`.
            sums: metrics summed over the batch's targets, including `loss`, and `targets`, the number of targets.
            rates: further metrics, which are returned as they are.

        Returns:
            The next state; and the metrics: averages over the targets, `rates`, `targets`, and `gradient_norm`, the
            norm of the model's gradients before clipping, NaN if the update was skipped.
        """
        targets = jnp.maximum(sums["targets"], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / targets, gradients)
        norms = {name: optax.tree.norm(tree) for name, tree in gradients.items()}
        metrics = {name: total / targets for name, total in sums.items()}
        finite = jnp.isfinite(jnp.stack([metrics["loss"], *norms.values()])).all()
        metrics |= {**rates, "targets": targets}
        metrics["gradient_norm"] = jnp.where(finite, norms[PARAMS], jnp.nan)
        # A loop of one iteration or none, since loops update arrays in place. With a choice between the arrays of both
        # states, XLA on TPUs needs memory for another copy of the moments; with a branch, XLA on GPUs does.
        with jax.named_scope("optimizer"):
            _, state = jax.lax.while_loop(
                lambda carry: carry[0],
                lambda carry: (jnp.bool_(False), self._updated(carry[1], gradients)),
                (finite, state),
            )
        return state, metrics

    def _updated(self, state: TrainState, gradients: dict[str, Any]) -> TrainState:
        trainable, optimizer = {}, {}
        for name, rule in self._optimizers.items():
            updates, optimizer[name] = rule.update(
                gradients[name], state.optimizer[name], state.trainable[name]
            )
            trainable[name] = optax.apply_updates(state.trainable[name], updates)
        averaged: dict[str, Any] = {}
        if self._ema is not None:
            averaged = optax.incremental_update(trainable, state.averaged, 1 - self._ema)
        return TrainState(state.step + 1, trainable, optimizer, averaged)


def initial_state(
    config: RunConfig, method: ModelMethod, mesh: Mesh, params: Params | None = None
) -> tuple[TrainState, Any]:
    """Returns a run's state before its first step and the frozen part of its model; each device creates its own shards.

    Args:
        params: the model's parameters, which are donated; by default they are drawn at random from the run's seed.
    """
    update, key = Update(config, method.specs), jax.random.key(config.seed)
    abstract_base = method.abstract_frozen(mesh)[BASE]
    out = update.abstract_state(mesh), abstract_base

    def begin(params: Params | None) -> tuple[TrainState, Any]:
        if params is None:
            params = init_params(weight_specs(config.model), key)
        trained, base = method.adaptation.split(params, key)
        others = {
            name: init_params(specs, key, name) for name, specs in method.specs.items() if name != PARAMS
        }
        _, base_specs = method.adaptation.specs(weight_specs(config.model))
        base = map_specs(
            lambda _, spec, weight, leaf: stored(weight, spec.dims, storage_of(leaf)),
            base_specs,
            base,
            abstract_base,
        )
        return update.begin({PARAMS: trained, **others}), base

    initialise = jax.jit(begin, donate_argnums=0, out_shardings=shardings(out))
    with warnings.catch_warnings():
        # Weights that become several arrays, or another dtype, are freed but not used again, which JAX reports.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        state_and_base: tuple[TrainState, Any] = initialise(params)
    return state_and_base


def initial_dtypes(config: RunConfig, method: ModelMethod, mesh: Mesh) -> Any:
    """The dtypes that a run's initial weights are loaded in: float32, or that of `abstract_frozen` if all is frozen.

    A quantised weight has its format in place of a dtype.
    """
    base, trained = method.abstract_frozen(mesh)[BASE], specs_by_path(method.specs[PARAMS])
    leaves = jax.tree.leaves_with_path(base, is_leaf=is_quantised)
    frozen = {
        jax.tree_util.keystr(path, simple=True, separator="/"): storage_of(leaf) for path, leaf in leaves
    }

    def dtype(path: str, _: Weight) -> Any:
        return jnp.float32 if path in trained else frozen.get(path, jnp.float32)

    return map_specs(dtype, weight_specs(config.model))


def shardings(abstract: Any) -> Any:
    """The shardings of a tree of abstract arrays, as the same tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _abstract_optimizer(rule: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """The abstract optimizer state for abstract parameters.

    The moments get the parameters' shardings; without this, the compiler would replicate them on every device. An array
    is a parameter's moment if the end of its path is the parameter's path and their shapes are equal.
    """
    params_by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        ends = (params_by_path.get(path[start:]) for start in range(len(path) + 1))
        param = next((end for end in ends if end is not None and end.shape == leaf.shape), None)
        sharding = _on_all_devices(mesh) if param is None else param.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(rule.init, params))


def _on_all_devices(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
