"""The training step of a configuration, compiled for devices that need not be there, and the memory it takes."""

import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.compilation import programs_kept_in
from gemma2_jax.config import UserError
from gemma2_jax.distill.teacher import as_teacher
from gemma2_jax.formats.load import open_source
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, dim_sizes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.sharding.layout import check_activations, laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.inputs import abstract_batch, abstract_entries
from gemma2_jax.training.matching import abstract_matching
from gemma2_jax.training.optimizer import build_optimizer
from gemma2_jax.training.start import check_batch
from gemma2_jax.training.state import TrainState, abstract_state
from gemma2_jax.training.step import Taught, build_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
        argument: what a step is given: the state, the teacher, the batch.
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
    """What a step takes, without memory: shapes, dtypes and shardings."""

    state: TrainState
    teacher: Gemma2 | None
    batch: Any
    taught: Taught


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


def teacher_config(config: RunConfig) -> ModelConfig | None:
    """The sizes of the teacher that reads each batch; None if there is none.

    Raises:
        UserError: neither is its checkpoint here, nor are its sizes given.
    """
    return None if config.distill.cache is not None else judge_config(config)


def judge_config(config: RunConfig) -> ModelConfig | None:
    """The sizes of the teacher that validations ask, beside a cache as well; None if there is none.

    Raises:
        UserError: as `teacher_config`.
    """
    distill, student = config.distill, config.model
    if distill.teacher is None:
        return None
    sizes = distill.model
    if sizes is None:
        if not os.path.exists(distill.teacher):
            raise UserError(
                f"distill.teacher is {distill.teacher}, which is not here; give its sizes in distill.model, as "
                "`- /model@distill.model: gemma2_9b` does in an experiment."
            )
        sizes = open_source(distill.teacher).config
    return replace(sizes, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)


def mesh_of(config: RunConfig, topology: Topology) -> Mesh:
    """The configuration's mesh of these devices.

    Raises:
        UserError: it does not fit them, or does not divide the batch.
    """
    mesh = build_mesh(config.mesh, topology.devices)
    check_batch(config, mesh)
    return mesh


def abstract_inputs(config: RunConfig, mesh: Mesh) -> Inputs:
    """What a step of the configuration takes on a mesh.

    Raises:
        UserError: the mesh does not divide a weight, or the teacher's sizes are not known.
    """
    with laid_out(config.layout):
        return _abstract_inputs(config, mesh)


def compile_step(config: RunConfig, topology: Topology) -> Program:
    """Compiles one step. With `compilation_cache`, a run on these devices finds it there.

    Raises:
        UserError: mesh, batch, teacher or model do not fit each other, or the compiler refuses the program for
            another reason than memory.
    """
    mesh = mesh_of(config, topology)
    inputs = abstract_inputs(config, mesh)
    optimizer = build_optimizer(config.optimizer, config.training.steps)
    argument = device_bytes((inputs.state, inputs.teacher, inputs.batch, inputs.taught))
    begun = time.perf_counter()
    # The default device is for libraries of kernels that ask the machine what it is, rather than the mesh (tokamax).
    device = jax.default_device(topology.devices[0])
    with jax.set_mesh(mesh), device, laid_out(config.layout), _kept(config):
        step = build_train_step(config, optimizer, inputs.state)
        lowered = step.lower(inputs.state, inputs.teacher, inputs.batch, inputs.taught)
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


def _abstract_inputs(config: RunConfig, mesh: Mesh) -> Inputs:
    taught: Taught = None
    if config.distill.cache is not None:
        encoding = config.distill.encoding
        entries = None if encoding is None else encoding.entries or config.model.num_tokens
        if entries is None:
            raise UserError(
                "distill.encoding is null, so the cache's size is unknown; set it, as distill=cached does."
            )
        taught = abstract_entries(config.data, mesh, entries)
    teacher = _abstract_teacher(config, teacher_config(config), mesh)
    state = abstract_state(config.model, build_optimizer(config.optimizer, config.training.steps), mesh)
    state = replace(state, matching=abstract_matching(config, teacher, mesh))
    return Inputs(state, teacher, abstract_batch(config.data, mesh), taught)


def _abstract_teacher(config: RunConfig, sizes: ModelConfig | None, mesh: Mesh) -> Gemma2 | None:
    if sizes is None:
        return None
    with as_teacher(config.distill):
        check_activations(mesh, dim_sizes(sizes))
        return Gemma2(sizes, abstract_params(sizes, jnp.dtype(config.distill.dtype), mesh))


def judge_bytes(config: RunConfig, mesh: Mesh) -> int:
    """Bytes of a device's part of a teacher that no step is given, but validations are: one beside a cache."""
    if config.distill.cache is None:
        return 0
    with laid_out(config.layout):
        return device_bytes(_abstract_teacher(config, judge_config(config), mesh))


def _peak(found: Any, platform: str) -> int:
    """Bytes of a device that a program needs: arguments, results that are not written over them, and temporaries.

    CPUs and GPUs allocate all temporaries at once, so that a peak within them saves nothing; the CPU's compiler leaves
    them out of its own figure altogether. The TPU's compiler places everything itself, and its figure is what counts.
    """
    if platform == "tpu" and found.peak_memory_in_bytes:
        return int(found.peak_memory_in_bytes)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + results + found.temp_size_in_bytes)
