"""Machines that need not be there: `topology=v5e:4x4` to devices that a compiler knows, without any chip.

    v5e:4x4   v6e:16x16   v4:8x16x32   v5p:8x24x32   tpu7x:4x4x4     a TPU slice, by its chips along each dimension
    v5e:16x16*2                                                      two of them, joined by the data-centre network
    h100:8   h100:16   h200:8   a100:8   b200:8                      GPUs, in nodes of 8
    cpu:8                                                            this process's own CPU devices

A TPU v4 is compiled for as it is used, one device a chip ("megacore"); a TPU7x chip is two devices.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gemma2_jax.chips import CHIPS, Chip
from gemma2_jax.config import UserError, suggest
from gemma2_jax.machine import is_installed
from gemma2_jax.planning.gpus import target_config

GPUS_OF_A_NODE = 8
ACCEPTED = "accepted: v5e:4x4, v5e:16x16*2 (two slices), v4:8x16x32, v5p:8x24x32, h100:8, cpu:8 and the like"
# Round figures, so that everything can be tried without the extras: no bound in them is of use.
_CPU = Chip(("cpu",), 100e9, 2**34, 10e9, 1e9, 1e9, 0)


@dataclass(frozen=True)
class Topology:
    """Devices that a program is compiled for.

    Attributes:
        name: as it was asked for.
        chip: what each device is.
        devices: JAX's.
        platform: tpu, cuda or cpu.
        memory_fraction: of a device's memory that a program can have.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    platform: str
    memory_fraction: float = 1.0

    @property
    def capacity(self) -> int:
        """Bytes of a device that a program can have."""
        return int(self.chip.memory * self.memory_fraction)

    @property
    def slices(self) -> int:
        """How many of the platform's islands the devices come in."""
        return len({self.island(device) for device in self.devices})

    def island(self, device: Any) -> int:
        """Which slice or node a device is of; between them lies the data-centre network."""
        # A single slice's devices have no number.
        number: int = getattr(device, "slice_index", 0) if self.platform == "tpu" else device.process_index
        return number


def find_topology(name: str, gpu_memory_fraction: float = 0.75) -> Topology:
    """The topology of that name.

    Args:
        gpu_memory_fraction: of a GPU's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by default).

    Raises:
        UserError: the name cannot be read, there is none of that shape, or its compiler is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if match is None:
        raise UserError(f"topology={name} cannot be read; {ACCEPTED}.")
    kind, shape, slices = match[1], [int(size) for size in match[2].split("x")], int(match[3] or 1)
    known = (*CHIPS, "cpu")
    if kind not in known:
        raise UserError(f"topology={name} names no chip that is known, {suggest(kind, known)}.")
    dimensions = _CPU.dimensions if kind == "cpu" else CHIPS[kind].dimensions
    wanted = dimensions or 1
    if len(shape) != wanted or min(shape) < 1 or slices < 1 or (dimensions == 0 and slices > 1):
        shown = f"{kind}:" + "x".join(["4"] * wanted) if dimensions else f"{kind}:8"
        raise UserError(f"topology={name} is not a shape of {kind}; accepted: shapes such as {shown}.")
    if kind == "cpu":
        return Topology(name, _CPU, _cpus(name, shape[0]), "cpu")
    chip = CHIPS[kind]
    if dimensions:
        return Topology(name, chip, _tpus(name, kind, shape, slices), "tpu")
    return Topology(name, chip, _gpus(name, kind, chip, shape[0]), "cuda", gpu_memory_fraction)


def _cpus(name: str, count: int) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if count > len(devices):
        raise UserError(
            f"topology={name} asks for more CPU devices than there are ({len(devices)}); "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return tuple(devices[:count])


def _tpus(name: str, kind: str, shape: list[int], slices: int) -> tuple[Any, ...]:
    if not is_installed("libtpu"):
        raise UserError(
            f"topology={name} needs libtpu, the TPU's compiler: pip install -e '.[tpu]' brings it."
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    layout = "x".join(map(str, shape))
    return _describe(name, "tpu", f"{kind}:{layout}", options)


def _gpus(name: str, kind: str, chip: Chip, count: int) -> tuple[Any, ...]:
    if not any(is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        raise UserError(
            f"topology={name} needs JAX's CUDA plugin, the GPU's compiler: pip install -e '.[cuda12]' brings it."
        )
    nodes, rest = divmod(count, GPUS_OF_A_NODE)
    if nodes and rest:
        raise UserError(
            f"topology={name} asks for {count} GPUs; accepted: 1 to {GPUS_OF_A_NODE}, or a multiple of that."
        )
    layout = f"1x{max(nodes, 1)}x{GPUS_OF_A_NODE if nodes else rest}"
    return _describe(name, "cuda", kind, {"target_config": target_config(kind, chip), "topology": layout})


def _describe(name: str, platform: str, asked: str, options: dict[str, Any]) -> tuple[Any, ...]:
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=asked, **options)
    except Exception as error:  # of several types, by what the plugin dislikes
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"topology={name} was refused by the compiler of {platform}: {reason}.") from None
    return tuple(found.devices)
