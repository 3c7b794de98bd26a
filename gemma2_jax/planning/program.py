"""Compiles a training step for devices that need not be present, and reports its memory.

The step trains one run, or several runs in one program.
"""

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.compilation import use_compilation_cache
from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.messages import one_line
from gemma2_jax.methods.choose import check_sizes
from gemma2_jax.methods.method import FrozenModel, Method, frozen_in_step
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
    """Memory of a step on one device in bytes, as counted by the compiler.

    Attributes:
        argument: size of the step's arguments: state, frozen arrays and batch.
        temp: size of the temporaries; None if the program does not fit.
        peak: memory that the step needs, see `_peak`; if it does not fit, the size in the compiler's error.
        host: size of the temporaries in the host's memory (`compute.remat=offload`).
    """

    argument: int
    temp: int | None
    peak: int
    host: int = 0


@dataclass(frozen=True)
class Inputs:
    """Abstract inputs of a step: shapes, dtypes and shardings without data.

    Attributes:
        state: a `TrainState`; for several runs, one of each run by its name.
        frozen: frozen arrays that the method's loss uses.
        validating: frozen arrays that only evaluations use.
    """

    state: Any
    frozen: Any
    batch: Batch
    validating: Any


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
        seconds: time of tracing and compiling.
        text: text of the optimised program; None if the compiler found that it does not fit.
    """

    mesh: Mesh
    inputs: Inputs
    seconds: float
    memory: Memory
    text: str | None


def planned_method(runs: Sequence[RunConfig]) -> Method:
    """Builds the training method of one program's runs (see `programs_of`), without downloading anything.

    Raises:
        UserError: it needs sizes from a checkpoint that is not on this machine.
    """
    for run in runs:
        check_sizes(run)
    return method_of(runs)


def models_in_step(method: Method) -> list[FrozenModel]:
    """The frozen models whose forward pass a training step runs."""
    return list(frozen_in_step(method, method.frozen_models).values())


def mesh_of(runs: Sequence[RunConfig], topology: Topology) -> Mesh:
    """Builds the mesh that the runs of a program share from the devices of a topology.

    Raises:
        UserError: the mesh does not match the devices or does not divide the batch.
    """
    mesh = build_mesh(runs[0].mesh, topology.devices)
    for run in runs:
        check_batch(run, mesh)
    return mesh


def abstract_inputs(method: Method, update: UpdateRule, config: RunConfig, mesh: Mesh) -> Inputs:
    """Returns the abstract inputs of a step on a mesh.

    Raises:
        UserError: the mesh does not divide a weight.
    """
    with laid_out(config.layout):
        frozen = method.abstract_frozen(mesh)
        in_step = frozen_in_step(method, frozen)
        validating = {name: tree for name, tree in frozen.items() if name not in in_step}
        return Inputs(update.abstract_state(mesh), in_step, method.abstract_batch(mesh), validating)


def compile_step(runs: Sequence[RunConfig], topology: Topology, method: Method) -> Program:
    """Compiles one step. With `compilation_cache`, a later training on such devices loads it from there.

    Args:
        runs: the runs that the program trains (see `programs_of`); settings that they share are taken from the first.

    Raises:
        UserError: mesh, batch and models are incompatible, or compilation fails for a reason other than memory.
    """
    config, mesh = runs[0], mesh_of(runs, topology)
    update = update_of(runs, method)
    inputs = abstract_inputs(method, update, config, mesh)
    argument = device_bytes((inputs.state, inputs.frozen, inputs.batch))
    started = time.perf_counter()
    with for_topology(config, mesh, topology):
        step = build_train_step(method, update, inputs.state, config.layout, config.training.accumulation)
        lowered = step.lower(inputs.state, inputs.frozen, inputs.batch)
        memory, text = compiled(lowered, argument, topology, "the step")
    return Program(mesh, inputs, time.perf_counter() - started, memory, text)


@contextmanager
def for_topology(config: RunConfig, mesh: Mesh, topology: Topology) -> Iterator[None]:
    """Lowers and compiles everything inside for a topology, with the run's layout and compilation cache."""
    # Kernel libraries such as tokamax look at the default device, not at the mesh, to find the kind of device.
    device = jax.default_device(topology.devices[0])
    with jax.set_mesh(mesh), device, laid_out(config.layout), _compilation_cache(config):
        yield


def compiled(
    lowered: jax.stages.Lowered, argument: int, topology: Topology, what: str
) -> tuple[Memory, str | None]:
    """Compiles a program; returns its memory and its optimised text, None if it does not fit.

    Args:
        argument: bytes of its arguments on one device; what: its name in messages.

    Raises:
        UserError: compilation fails for a reason other than memory.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        required = required_bytes(str(error))
        if required is None:
            raise UserError(f"{what} cannot be compiled for {topology.name}: {one_line(error)}.") from None
        return Memory(argument, None, required), None
    found: Any = program.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        _peak(found, topology.platform),
        found.host_temp_size_in_bytes,
    )
    return memory, program.as_text()


@contextmanager
def _compilation_cache(config: RunConfig) -> Iterator[None]:
    """Opens the compilation cache without JAX's warning about entries that it cannot read.

    A cached program cannot be loaded without its devices, so planning compiles it again.
    """
    with use_compilation_cache(config.compilation_cache), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        yield


def required_bytes(error: str) -> int | None:
    """Returns the memory that a program needs according to a compiler error; None if the error is not about memory."""
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
    """Returns the bytes of one device's shards of a tree of abstract arrays."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total


def _peak(found: Any, platform: str) -> int:
    """Returns the bytes that a program needs on a device: arguments, results not aliased to them, and temporaries.

    CPUs and GPUs allocate all temporaries at once, so the compiler's own peak is too low there; the CPU compiler's peak
    leaves temporaries out altogether. The TPU compiler places every array itself, so its peak is exact.
    """
    if platform == "tpu" and found.peak_memory_in_bytes:
        return int(found.peak_memory_in_bytes)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + results + found.temp_size_in_bytes)
