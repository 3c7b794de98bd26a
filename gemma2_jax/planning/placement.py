"""What lies where on a mesh: each weight's split and a device's part of it, and how activations are laid out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.distill.teacher import as_teacher, online_teacher
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import abstract_params, specs_by_path, weight_specs
from gemma2_jax.planning.program import device_bytes, mesh_of
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import Axes, laid_out, layout_in_use


@dataclass(frozen=True)
class PlacedWeight:
    """A weight at rest; gradients and moments lie as it does.

    Attributes:
        sizes, axes: of each dimension by its letter (see `gemma2_jax`): its size, and the mesh axes that split it.
        device_bytes: of a device's part.
    """

    path: str
    sizes: dict[str, int]
    axes: dict[str, Axes]
    device_bytes: int


@dataclass(frozen=True)
class PlacedModel:
    """A model on a mesh.

    Attributes:
        role: student (what is trained), with its name where there are several, or teacher.
        activations: the mesh axes that split a letter of its activations.
        head: those that split the vocabulary in the LM head; tokens lie along what is left of theirs.
    """

    role: str
    weights: list[PlacedWeight]
    activations: dict[str, Axes]
    head: Axes


@dataclass(frozen=True)
class Placement:
    """What lies where, without anything compiled."""

    name: str
    topology: str
    mesh: dict[str, int]
    models: list[PlacedModel]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)


def find_placement(runs: Sequence[RunConfig], topology: Topology) -> Placement:
    """What lies where when one program trains `runs` on `topology`; of several, one with a teacher comes first.

    Raises:
        UserError: mesh, batch, model and teacher do not fit each other.
    """
    config, mesh = runs[0], mesh_of(runs, topology)
    with laid_out(config.layout):
        models = [
            _place("student" if len(runs) == 1 else f"student {run.name}", run.model, "float32", mesh)
            for run in runs
        ]
        teacher = online_teacher(config.distill, config.model)
        if teacher is not None:
            with as_teacher(config.distill):
                models.append(_place("teacher", teacher, config.distill.dtype, mesh))
    return Placement(" + ".join(run.name for run in runs), topology.name, dict(mesh.shape), models)


def _place(role: str, model: ModelConfig, dtype: str, mesh: Mesh) -> PlacedModel:
    layout, specs = layout_in_use(), weight_specs(model)
    leaves = jax.tree.leaves(abstract_params(specs, jnp.dtype(dtype), mesh))
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
    """Without the axes that are 1, which split nothing."""
    found = {letter: tuple(axis for axis in axes if mesh.shape[axis] > 1) for letter, axes in column.items()}
    return {letter: axes for letter, axes in found.items() if axes}
