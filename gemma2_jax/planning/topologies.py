"""Devices to compile for that need not be present, from a name such as `topology=v5e:4x4`.

    v5e:4x4   v6e:16x16   v4:8x16x32   v5p:8x24x32   tpu7x:4x4x4     a TPU slice, by its chips along each dimension
    v5e:16x16*2                                                      two slices, joined by the data-centre network
    h100:8   h100:16   h200:8   a100:8   b200:8                      GPUs, in nodes of 8
    cpu:8                                                            this process's CPU devices

A TPU v4 chip is one device ("megacore"), as in normal use; a TPU7x chip is two devices.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gemma2_jax.chips import CHIPS, Chip
from gemma2_jax.config import UserError, suggest
from gemma2_jax.machine import is_installed
from gemma2_jax.messages import one_line
from gemma2_jax.planning.gpus import target_config

GPUS_PER_NODE = 8
ACCEPTED = (
    "accepted: names such as v5e:4x4, v5e:16x16*2 (two slices), v4:8x16x32, v5p:8x24x32, h100:8 and cpu:8"
)
# Placeholder figures, so that planning can be tried without the extras; bounds computed from them mean nothing.
_CPU = Chip(("cpu",), 100e9, 2**34, 10e9, 1e9, 1e9, 0)
_DEVICES_PER_CHIP = {"tpu7x": 2}


@dataclass(frozen=True)
class Machines:
    """Devices that a step is estimated for by formula, which needs no compiler for them.

    Attributes:
        name: name given by the user.
        chip: figures of the chip.
        platform: tpu, cuda or cpu.
        devices: number of devices, as JAX counts them.
        slices: number of slices (TPU) or nodes (GPU) that the devices belong to.
        capacity: bytes of a device's memory that a program can use.
    """

    name: str
    chip: Chip
    platform: str
    devices: int
    slices: int
    capacity: int


@dataclass(frozen=True)
class Topology:
    """Devices that a program is compiled for.

    Attributes:
        name: name given by the user.
        chip: figures of the chip.
        devices: JAX devices.
        platform: tpu, cuda or cpu.
        memory_fraction: fraction of a device's memory that a program can use.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    platform: str
    memory_fraction: float = 1.0

    @property
    def capacity(self) -> int:
        """Bytes of a device's memory that a program can use."""
        return int(self.chip.memory * self.memory_fraction)

    @property
    def machines(self) -> Machines:
        return Machines(self.name, self.chip, self.platform, len(self.devices), self.slices, self.capacity)

    @property
    def slices(self) -> int:
        """Number of slices (TPU) or nodes (GPU) that the devices belong to."""
        return len({self.island(device) for device in self.devices})

    def island(self, device: Any) -> int:
        """Returns the number of the slice or node that a device belongs to; the data-centre network joins them."""
        # The devices of a single slice have no slice_index.
        number: int = getattr(device, "slice_index", 0) if self.platform == "tpu" else device.process_index
        return number


@dataclass(frozen=True)
class _Name:
    """The parts of a topology's name: v5e:16x16*2 has the kind v5e, the shape [16, 16] and 2 slices."""

    name: str
    kind: str
    shape: list[int]
    slices: int

    @property
    def chip(self) -> Chip:
        return _CPU if self.kind == "cpu" else CHIPS[self.kind]

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.dimensions else "cpu" if self.kind == "cpu" else "cuda"

    @property
    def nodes(self) -> int:
        return max(1, self.shape[0] // GPUS_PER_NODE)


def find_topology(name: str, gpu_memory_fraction: float = 0.75) -> Topology:
    """Returns the topology of a name.

    Args:
        gpu_memory_fraction: fraction of a GPU's memory that JAX allocates (XLA_PYTHON_CLIENT_MEM_FRACTION).

    Raises:
        UserError: the name is malformed, the chip does not exist in that shape, or its compiler is not installed.
    """
    parts = _parse(name)
    find = {"cpu": _cpus, "tpu": _tpus, "cuda": _gpus}[parts.platform]
    fraction = gpu_memory_fraction if parts.platform == "cuda" else 1.0
    return Topology(name, parts.chip, find(parts), parts.platform, fraction)


def find_machines(name: str, gpu_memory_fraction: float = 0.75) -> Machines:
    """Returns the machines of a topology's name, without a compiler for them; errors as in `find_topology`."""
    parts = _parse(name)
    if parts.platform == "cpu":
        return find_topology(name).machines
    chip, count = parts.chip, math.prod(parts.shape) * parts.slices
    if parts.platform == "cuda":
        return Machines(name, chip, "cuda", count, parts.nodes, int(chip.memory * gpu_memory_fraction))
    return Machines(
        name, chip, "tpu", count * _DEVICES_PER_CHIP.get(parts.kind, 1), parts.slices, chip.memory
    )


def _parse(name: str) -> _Name:
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if match is None:
        raise UserError(f"topology={name} is not of the form CHIP:SHAPE; {ACCEPTED}.")
    kind, shape, slices = match[1], [int(size) for size in match[2].split("x")], int(match[3] or 1)
    known = (*CHIPS, "cpu")
    if kind not in known:
        raise UserError(f"topology={name} names the unknown chip {kind}, {suggest(kind, known)}.")
    parts = _Name(name, kind, shape, slices)
    dimensions = parts.chip.dimensions
    rank = dimensions or 1
    if len(shape) != rank or min(shape) < 1 or slices < 1 or (dimensions == 0 and slices > 1):
        shown = f"{kind}:" + "x".join(["4"] * rank) if dimensions else f"{kind}:8"
        raise UserError(
            f"topology={name} has a shape that {kind} does not have; accepted: shapes such as {shown}."
        )
    if parts.platform == "cuda" and shape[0] > GPUS_PER_NODE and shape[0] % GPUS_PER_NODE:
        raise UserError(
            f"topology={name} has {shape[0]} GPUs; accepted: 1 to {GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE}."
        )
    return parts


def _cpus(parts: _Name) -> tuple[Any, ...]:
    devices, count = jax.devices("cpu"), parts.shape[0]
    if count > len(devices):
        raise UserError(
            f"topology={parts.name} needs {count} CPU devices, and this process has {len(devices)}; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return tuple(devices[:count])


def _tpus(parts: _Name) -> tuple[Any, ...]:
    if not is_installed("libtpu"):
        raise UserError(
            f"topology={parts.name} needs libtpu, the TPU compiler, which is not installed: pip install -e '.[tpu]'."
        )
    options: dict[str, Any] = {"num_slices": parts.slices} if parts.slices > 1 else {}
    if parts.kind == "v4":
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if set(parts.shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    layout = "x".join(map(str, parts.shape))
    return _describe(parts.name, "tpu", f"{parts.kind}:{layout}", options)


def _gpus(parts: _Name) -> tuple[Any, ...]:
    if not any(is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        raise UserError(
            f"topology={parts.name} needs JAX's CUDA plugin, the GPU compiler, which is not installed: "
            "pip install -e '.[cuda12]'."
        )
    layout = f"1x{parts.nodes}x{min(parts.shape[0], GPUS_PER_NODE)}"
    target = target_config(parts.kind, parts.chip)
    return _describe(parts.name, "cuda", parts.kind, {"target_config": target, "topology": layout})


def _describe(name: str, platform: str, jax_name: str, options: dict[str, Any]) -> tuple[Any, ...]:
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=jax_name, **options)
    except Exception as error:  # plugins raise several types
        raise UserError(
            f"topology={name} was rejected by the {platform} compiler: {one_line(error)}."
        ) from None
    return tuple(found.devices)
