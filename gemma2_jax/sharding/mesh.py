"""The device mesh: named axes over which batches and weights are split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gemma2_jax.config import UserError

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, for all the devices that are left.

    Attributes:
        data: copies of the whole model, each with its share of the batch.
        fsdp: devices that share a batch axis and also split every weight among them, gathering one pair
            of layers at a time (ZeRO-3; Rajbhandari et al., arXiv 1910.02054).
        tensor: devices that split heads, feed-forward width and vocabulary (Shoeybi et al., arXiv 1909.08053).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise UserError(
                    f"mesh.{axis} is {size}; it must be at least 1, or -1 for the devices that are left."
                )
        if sizes.count(-1) > 1:
            raise UserError(
                f"mesh has -1 for more than one of {', '.join(AXES)}; only one of them can be -1."
            )


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay `devices` (all there are by default) out as a (data, fsdp, tensor) mesh.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh {asked} does not fit {len(devices)} device(s); the axes must multiply to that number."
        )
    if devices == jax.devices():
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
