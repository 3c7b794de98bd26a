"""The device mesh: named axes over which batches and weights are split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gemma2_jax.config import UserError

AXES = ("replica", "data", "fsdp", "sequence", "tensor")  # from the slowest network to the fastest


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, for all remaining devices.

    Attributes:
        data: copies of the whole model, each with its share of the batch.
        fsdp: devices that split the batch and also every weight among them, gathering the weights of one layer at a
            time (ZeRO-3; Rajbhandari et al., arXiv 1910.02054).
        tensor: devices that split heads, feed-forward width and vocabulary (Shoeybi et al., arXiv 1909.08053).
        sequence: devices that split each sequence; every layer's keys and values are gathered.
        replica: copies of the whole model, as along `data`, but between TPU slices, whose network is slower; a multiple
            of the number of slices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    replica: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise UserError(
                    f"mesh.{axis} is {size}; it must be at least 1, or -1 for all remaining devices."
                )
        if sizes.count(-1) > 1:
            raise UserError(
                f"mesh has -1 for more than one of {', '.join(AXES)}; only one of them can be -1."
            )


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges `devices` (by default all) as a mesh with the axes `AXES`.

    Raises:
        UserError: the product of the axes is not the number of devices, or `replica` is not a multiple of their slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(shape) != len(devices):
        raise UserError(_misfit(dict(zip(AXES, sizes, strict=True)), given, devices))
    # A GPU also has a `slice_index`, that of its node. Nodes hold consecutive devices, and the axes that send the most
    # come last, so they stay within a node without special treatment.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform != "gpu"}) or 1
    if shape[0] % slices:
        raise UserError(
            f"mesh.replica is {shape[0]}, but the devices come in {slices} slices; it must be a multiple of {slices}, "
            "so that only gradients cross the network between slices."
        )
    types = (AxisType.Auto,) * len(AXES)
    array: np.ndarray
    # A mesh axis may take a part of a torus axis: the report's 9B has 4 model shards on 8x16x32 chips.
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = [shape[0] // slices, *shape[1:]]
        between = [slices, *(1 for _ in shape[1:])]
        array = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=types)


def _misfit(sizes: Mapping[str, int], given: int, devices: Sequence[jax.Device]) -> str:
    """The message about axes whose product is not the number of devices."""
    count = len(devices)
    settings = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "mesh.data=1"
    needed = f"a multiple of {given}" if -1 in sizes.values() else f"exactly {given}"
    there = "1 device" if count == 1 else f"{count} devices"
    remedy = f"choose axes that multiply to {count}"
    if devices[0].platform == "cpu":
        remedy += f", or get {given} with XLA_FLAGS=--xla_force_host_platform_device_count={given}"
    return f"{settings} needs {needed} devices, but there {'is' if count == 1 else 'are'} {there}; {remedy}."
