"""The least time that a step can take: by its products, its memory traffic, and each network that it sends over.

All of it is an estimate, a bound from below: each part at the peak that the maker tells, everything else at the same
time (Williams et al., Communications of the ACM 52, 2009; for networks arXiv 2211.05102, section 3.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters, forward_flops_per_token
from gemma2_jax.planning.count import Cost
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step that no device can stay below, by what bounds it.

    Attributes:
        compute: products at the peak of bfloat16.
        memory: bytes at the peak of HBM.
        network: by the mesh axes that collectives go along, joined by +.
    """

    compute: float
    memory: float
    network: dict[str, float]

    @property
    def all(self) -> dict[str, float]:
        """Every bound by its name."""
        return {"compute": self.compute, "memory": self.memory} | {
            f"network along {axes}": seconds for axes, seconds in self.network.items()
        }

    @property
    def binding(self) -> str:
        """The name of the largest."""
        return max(self.all, key=self.all.__getitem__)

    @property
    def seconds(self) -> float:
        """The largest: the least time of a step."""
        return self.all[self.binding]


def bounds(cost: Cost, kernel_flops: float, mesh: Mesh, topology: Topology) -> Bounds:
    """The bounds of a program of which one device does `cost`, and `kernel_flops` more in kernels of its own."""
    chip = topology.chip
    sent: dict[tuple[str, ...], float] = {}
    for (_, axes), amount in cost.sent.items():
        if axes:
            sent[axes] = sent.get(axes, 0.0) + amount
    return Bounds(
        compute=(cost.flops + kernel_flops) / chip.peak_flops,
        memory=cost.bytes / chip.memory_bandwidth,
        network={
            "+".join(axes): amount / bandwidth_along(axes, mesh, topology) for axes, amount in sent.items()
        },
    )


def bandwidth_along(axes: tuple[str, ...], mesh: Mesh, topology: Topology) -> float:
    """Bytes per second that a device can send to others that differ from it along these mesh axes.

    Where the axes lead out of a slice or node, that of the data-centre network, which is the narrower. Within a TPU
    slice, that of both links along each dimension of the torus in which these devices lie; within a node of GPUs, that
    of NVLink.
    """
    chip = topology.chip
    chosen = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.ravel(mesh.devices[chosen])
    if len({topology.island(device) for device in group}) > 1:
        return chip.network_bandwidth
    if chip.dimensions == 0:
        return chip.link_bandwidth
    places = np.array([device.coords for device in group])
    spanned = sum(len(np.unique(along)) > 1 for along in places.T)
    return chip.link_bandwidth * 2 * max(1, spanned)  # two devices of one chip share what it has


def kernel_flops(runs: Sequence[RunConfig], teacher: ModelConfig | None, cost: Cost, devices: int) -> float:
    """FLOPs of attention that a device does where the program does not tell them: by formula.

    They are in kernels of their own, or in loops over blocks of keys, as many as a block of queries sees.

    Forward 4*N*H for each visible pair of query and key, backward 2.5 times as much, since scores are computed again
    (FlashAttention-2, arXiv 2307.08691, section 3.1); one forward pass more where the backward pass computes a pair of
    layers again, and one of the teacher. Hidden pairs that a kernel computes are left out.
    """
    if not cost.kernels and not cost.uncounted:
        return 0.0
    config = runs[0]
    passes = 3.5 + (config.compute.remat != "none")
    flops = passes * sum(attention_flops_per_token(run.model, config.data.seq_len) for run in runs)
    if teacher is not None:
        flops += attention_flops_per_token(teacher, config.data.seq_len)
    return flops * config.data.batch_size * config.data.seq_len / devices


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Of one forward pass: the formula's, less what it counts for the weights."""
    return forward_flops_per_token(model, seq_len) - 2.0 * count_parameters(model).total


def share_of_peak(model_flops: float, seconds: float, devices: int, topology: Topology) -> float:
    """Model-FLOP utilisation of a step that takes `seconds`."""
    if seconds <= 0 or math.isinf(seconds):
        return 0.0
    return model_flops / (seconds * devices * topology.chip.peak_flops)
