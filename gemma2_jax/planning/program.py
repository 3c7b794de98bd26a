"""The training step of one run, or of several that share it, compiled for devices that need not be there.

Beside it the memory that it takes.
"""

import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.compilation import programs_kept_in
from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.methods.method import Method, frozen_in_step
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.start import check_batch
from gemma2_jax.training.state import UpdateRule
from gemma2_jax.training.step import build_train_step
from gemma2_jax.training.together import method_of, update_of

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
        argument: what a step is given: the state, what is frozen, the batch.
        temp: what it makes and drops; None where the compiler gave up.
        peak: what has to be free for it, see `_peak`; of a program that does not fit, what the compiler wanted.
        host: what lies in the host's memory for it (`compute.remat=offload`).
    """

    argument: int
    temp: int | None
    peak: int
    host: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a step takes, without memory: shapes, dtypes and shardings.

    Attributes:
        state: a `TrainState`, or one for each of several runs by its name.
        frozen: what a method's loss takes beside the state; validating: what only its validations take.
    """

    state: Any
    frozen: Any
    batch: Batch
    validating: Any


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
        seconds: of compiling, tracing included.
        text: the optimised program; None if the compiler found that it does not fit.
    """

    mesh: Mesh
    inputs: Inputs
    seconds: float
    memory: Memory
    text: str | None


def check_sizes(config: RunConfig) -> None:
    """Raises UserError if the sizes of the teacher are not given, and its checkpoint is not on this machine."""
    teacher = config.distill.teacher
    if teacher is not None and config.distill.model is None and not os.path.exists(teacher):
        raise UserError(
            f"distill.teacher is {teacher}, which is not here; give its sizes in distill.model, as "
            "`- /model@distill.model: gemma2_9b` does in an experiment."
        )


def mesh_of(runs: Sequence[RunConfig], topology: Topology) -> Mesh:
    """The mesh of these devices that the runs of one program share.

    Raises:
        UserError: it does not fit them, or does not divide the batch; or the teacher's sizes are not known.
    """
    for run in runs:
        check_sizes(run)
    mesh = build_mesh(runs[0].mesh, topology.devices)
    for run in runs:
        check_batch(run, mesh)
    return mesh


def abstract_inputs(method: Method, update: UpdateRule, config: RunConfig, mesh: Mesh) -> Inputs:
    """What a step takes on a mesh.

    Raises:
        UserError: the mesh does not divide a weight, or the teacher's sizes are not known.
    """
    with laid_out(config.layout):
        frozen = method.abstract_frozen(mesh)
        in_step = frozen_in_step(method, frozen)
        validating = {name: tree for name, tree in frozen.items() if name not in in_step}
        return Inputs(update.abstract_state(mesh), in_step, method.abstract_batch(mesh), validating)


def compile_step(runs: Sequence[RunConfig], topology: Topology, method: Method | None = None) -> Program:
    """Compiles one step. With `compilation_cache`, a training on these devices finds it there.

    Args:
        runs: of one program (`programs_of`), which share all that is asked of the first one here.
        method: what the runs learn; by default what the configurations ask for.

    Raises:
        UserError: mesh, batch, teacher or model do not fit each other, or the compiler refuses the program for
            another reason than memory.
    """
    config, mesh = runs[0], mesh_of(runs, topology)
    chosen: Method = method_of(runs) if method is None else method
    update = update_of(runs, chosen)
    inputs = abstract_inputs(chosen, update, config, mesh)
    argument = device_bytes((inputs.state, inputs.frozen, inputs.batch))
    begun = time.perf_counter()
    # The default device is for libraries of kernels that ask the machine what it is, rather than the mesh (tokamax).
    device = jax.default_device(topology.devices[0])
    with jax.set_mesh(mesh), device, laid_out(config.layout), _kept(config):
        step = build_train_step(chosen, update, inputs.state, config.layout, config.training.accumulation)
        lowered = step.lower(inputs.state, inputs.frozen, inputs.batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            wanted = wanted_bytes(str(error))
            if wanted is None:
                reason = " ".join(str(error).split())[:500].rstrip(".")
                raise UserError(f"the compiler of {topology.name} refuses the step: {reason}.") from None
            seconds = time.perf_counter() - begun
            return Program(mesh, inputs, seconds, Memory(argument, None, wanted), None)
    seconds = time.perf_counter() - begun
    found: Any = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        _peak(found, topology.platform),
        found.host_temp_size_in_bytes,
    )
    return Program(mesh, inputs, seconds, memory, compiled.as_text())


@contextmanager
def _kept(config: RunConfig) -> Iterator[None]:
    """`programs_kept_in`, where a program that was kept can not be loaded without its devices, and is compiled anew."""
    with programs_kept_in(config.compilation_cache), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        yield


def wanted_bytes(error: str) -> int | None:
    """The memory that a program would take, out of the compiler's own error; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in error and "Ran out of memory" not in error:
        return None
    for pattern in (
        r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm",
        r"\(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM",
        r"Total hbm usage >= ([\d.]+)([KMGT]?)",
    ):
        match = re.search(pattern, error)
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2]])
    return None


def device_bytes(tree: Any) -> int:
    """Bytes of one device's parts of some abstract arrays."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total


def _peak(found: Any, platform: str) -> int:
    """Bytes of a device that a program needs: arguments, results that are not written over them, and temporaries.

    CPUs and GPUs allocate all temporaries at once, so that a peak within them saves nothing; the CPU's compiler leaves
    them out of its own figure altogether. The TPU's compiler places everything itself, and its figure is what counts.
    """
    if platform == "tpu" and found.peak_memory_in_bytes:
        return int(found.peak_memory_in_bytes)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + results + found.temp_size_in_bytes)
