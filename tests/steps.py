"""Training steps without a run folder, for tests that look at what a step does."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Wrapped

from gemma2_jax.data.batch import Batch
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.state import TrainState, Update, initial_state
from gemma2_jax.training.step import build_train_step


def prepared(
    run: RunConfig, mesh: Mesh, teacher: Gemma2 | None = None, method: LanguageModelling | None = None
) -> tuple[Wrapped, TrainState, dict[str, Any]]:
    """The step, the state before the first one, and what is frozen."""
    method = build_method(run) if method is None else method
    update = Update(run, method.specs)
    abstract = update.abstract_state(mesh)
    state, base = initial_state(run, method, mesh)
    frozen: dict[str, Any] = {BASE: base}
    if teacher is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, method.abstract_frozen(mesh)["teacher"])
        frozen["teacher"] = jax.device_put(teacher, shardings)
    step = build_train_step(method, update, abstract, run.layout, run.training.accumulation)
    return step, state, frozen


def take_steps(
    run: RunConfig, mesh: Mesh, batches: Sequence[Batch], teacher: Gemma2 | None = None
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains on the batches, one step each: the state after them, and the metrics of each."""
    with jax.set_mesh(mesh):
        step, state, frozen = prepared(run, mesh, teacher)
        rows = []
        for batch in batches:
            state, row = step(state, frozen, on_mesh(batch, mesh))
            rows.append({name: float(value) for name, value in row.items()})
    return state, rows
