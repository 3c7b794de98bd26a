"""Groups of a sweep's runs that share data and teacher, and fit into the memory of this machine as one program."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax

from gemma2_jax.chips import chip_of_kind
from gemma2_jax.config import UserError
from gemma2_jax.planning.memory import memory_parts
from gemma2_jax.planning.program import abstract_inputs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.studies.trials import Combination, Sweep
from gemma2_jax.training.start import with_prepared_vocabulary
from gemma2_jax.training.together import check_alike, method_of, programs_of, update_of

_SHARE = 0.75  # of a device's memory: what JAX takes of a GPU, and what else is in a CPU's memory


def check_groups(sweep: Sweep) -> None:
    """Raises UserError if the sweep trains its runs in parts, or if no run has a teacher that others could share."""
    if sweep.settings.rungs or sweep.is_adaptive:
        why = "stops at rungs" if sweep.settings.rungs else "draws trials from the results of others"
        raise UserError(
            f"--together trains all runs of a group to their end, but this sweep {why}; leave it out."
        )
    if not any(run.config.distill.has_teacher for trial in sweep.trials for run in trial):
        raise UserError(
            "--together shares a teacher's forward pass, but no run has distill.teacher; set it, or leave --together "
            "out."
        )


def with_groups(sweep: Sweep, capacity: int | None = None) -> Sweep:
    """Returns the sweep with groups of runs to train together.

    Args:
        capacity: bytes of a device that a group may take; by default those of this machine's devices.
    """
    limit = device_capacity() if capacity is None else capacity
    groups: list[list[Combination]] = []
    for run in (run for trial in sweep.trials for run in trial):
        for group in groups:
            members = [*group, run]
            if _alike(members) and estimated_bytes([each.config for each in members]) <= limit:
                group.append(run)
                break
        else:
            groups.append([run])
    return dataclasses.replace(sweep, groups=[[run.key for run in group] for group in groups])


def estimated_bytes(runs: Sequence[RunConfig]) -> int:
    """Estimates the memory of a device for a step that trains all runs, by the formulas of `gemma2 plan`."""
    (program,) = programs_of([with_prepared_vocabulary(run) for run in runs])
    method, mesh = method_of(program), build_mesh(program[0].mesh)
    with jax.set_mesh(mesh):
        inputs = abstract_inputs(method, update_of(program, method), program[0], mesh)
    parts = dataclasses.asdict(memory_parts(program, inputs, dict(mesh.shape)))
    del parts["parameters_by_run"]
    return sum(parts.values())


def device_capacity() -> int:
    """Returns the bytes of a device of this process that a program may take."""
    device = jax.local_devices()[0]
    chip = chip_of_kind(device.device_kind)
    if device.platform == "cpu" or chip is None:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return math.floor(_SHARE * machine / jax.local_device_count())
    return math.floor(_SHARE * chip.memory)


def _alike(runs: Sequence[Combination]) -> bool:
    """Whether runs can be trained together, and gain by it."""
    if not any(run.config.distill.has_teacher for run in runs):
        return False
    try:
        check_alike([run.config for run in runs])
    except UserError:
        return False
    return True
