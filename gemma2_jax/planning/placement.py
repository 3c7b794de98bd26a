"""How a run's arrays are sharded on a mesh: the axes that split each weight and the activations, and shard sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.methods.method import BASE, frozen_in_step
from gemma2_jax.model.adaptation import divided_specs
from gemma2_jax.model.quantised import is_quantised
from gemma2_jax.model.weights import Specs, abstract_params, frozen_dtypes, specs_by_path, weight_specs
from gemma2_jax.planning.program import device_bytes, mesh_of, planned_method
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import Axes, laid_out, layout_in_use


@dataclass(frozen=True)
class PlacedWeight:
    """Sharding of one weight; its gradient and moments are sharded the same way.

    Attributes:
        path: path of the weight in the parameter tree.
        sizes: size of each dimension, by its letter (see `gemma2_jax`).
        axes: mesh axes that split each dimension, by its letter; dimensions that are not split are left out.
        device_bytes: size in bytes of one device's shard.
    """

    path: str
    sizes: dict[str, int]
    axes: dict[str, Axes]
    device_bytes: int


@dataclass(frozen=True)
class PlacedModel:
    """Sharding of a model on a mesh.

    Attributes:
        role: student or adapter (trained weights), base (frozen weights of the same model), or the name of another
            frozen model, such as teacher. One of several students has its name: student NAME.
        activations: mesh axes that split each dimension of the activations, by its letter.
        head: mesh axes that split the vocabulary in the LM head. Tokens are split along their remaining axes.
    """

    role: str
    weights: list[PlacedWeight]
    activations: dict[str, Axes]
    head: Axes


@dataclass(frozen=True)
class Placement:
    """Sharding of a run's models on a topology, found without compiling anything."""

    name: str
    topology: str
    mesh: dict[str, int]
    models: list[PlacedModel]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)


def find_placement(runs: Sequence[RunConfig], topology: Topology) -> Placement:
    """Returns how the arrays of a program are sharded on a topology.

    Args:
        runs: the runs that the program trains; a run with a teacher comes first (see `programs_of`).

    Raises:
        UserError: mesh, batch and models are incompatible.
    """
    method = planned_method(runs)
    config, mesh = runs[0], mesh_of(runs, topology)
    with laid_out(config.layout):
        models = [placed for run in runs for placed in _place_run(run, len(runs) == 1, mesh)]
        for name, model in frozen_in_step(method, method.frozen_models).items():
            with model.laid_out():
                models.append(_place(name, weight_specs(model.config), model.dtype, mesh))
    return Placement(" + ".join(run.name for run in runs), topology.name, dict(mesh.shape), models)


def _place_run(run: RunConfig, is_only: bool, mesh: Mesh) -> list[PlacedModel]:
    """The trained part of a run's model, and the frozen part if it has one."""
    trained, frozen = divided_specs(run.adaptation, run.model)
    name = "" if is_only else f" {run.name}"
    if not frozen:
        return [_place(f"student{name}", trained, jnp.float32, mesh)]
    role = "adapter" if run.adaptation.is_adapter else "student"
    dtypes = frozen_dtypes(frozen, run.compute.dtype, run.adaptation.format)
    base = _place(f"{BASE}{name}", frozen, dtypes, mesh)
    return [_place(f"{role}{name}", trained, jnp.float32, mesh), base]


def _place(role: str, specs: Specs, dtype: Any, mesh: Mesh) -> PlacedModel:
    """The sharding of weights of a dtype, or of dtypes laid out like them."""
    layout = layout_in_use()
    leaves = jax.tree.leaves(abstract_params(specs, dtype, mesh), is_leaf=is_quantised)
    weights = [
        PlacedWeight(
            path,
            weight.sizes,
            _split({letter: layout.weights.get(letter, ()) for letter in weight.dims}, mesh),
            device_bytes(leaf),
        )
        for (path, weight), leaf in zip(specs_by_path(specs).items(), leaves, strict=True)
    ]
    head = tuple(axis for axis in layout.head if mesh.shape[axis] > 1)
    return PlacedModel(role, weights, _split(layout.activations, mesh), head)


def _split(column: Mapping[str, Axes], mesh: Mesh) -> dict[str, Axes]:
    """Leaves out mesh axes of size 1, which split nothing."""
    found = {letter: tuple(axis for axis in axes if mesh.shape[axis] > 1) for letter, axes in column.items()}
    return {letter: axes for letter, axes in found.items() if axes}
