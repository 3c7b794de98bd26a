"""Lower bounds on the time of a step: by its products, its memory traffic, and each network that it uses.

All bounds are estimates: each part runs at its data-sheet peak, and all parts fully overlap (Williams et al.,
Communications of the ACM 52, 2009; for networks arXiv 2211.05102, section 3.1).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from gemma2_jax.methods.method import FrozenModel
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters, forward_flops_per_token
from gemma2_jax.planning.count import ProgramCost
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on the seconds of a step, by resource.

    Attributes:
        compute: seconds of the products at peak bfloat16 FLOPs.
        memory: seconds of the memory traffic at peak HBM bandwidth.
        network: seconds of the collectives, by the mesh axes that they run along, joined by +.
    """

    compute: float
    memory: float
    network: dict[str, float]

    @property
    def all(self) -> dict[str, float]:
        """All bounds by name."""
        return {"compute": self.compute, "memory": self.memory} | {
            f"network along {axes}": seconds for axes, seconds in self.network.items()
        }

    @property
    def binding(self) -> str:
        """The name of the largest bound."""
        return max(self.all, key=self.all.__getitem__)

    @property
    def seconds(self) -> float:
        """The largest bound: the minimum time of a step."""
        return self.all[self.binding]


def bounds(cost: ProgramCost, kernel_flops: float, mesh: Mesh, topology: Topology) -> Bounds:
    """Returns the bounds of a program.

    Args:
        cost: counted cost of the program on one device.
        kernel_flops: FLOPs of one device in custom kernels, which `cost` does not contain.
    """
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
    """Returns the bytes per second that a device can send to the other devices along these mesh axes.

    If the axes span several slices or nodes, it is the bandwidth of the data-centre network, which is the slowest.
    Within a TPU slice, it is that of both links along each dimension of the torus that the devices span; within a node
    of GPUs, that of NVLink.
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
    return chip.link_bandwidth * 2 * max(1, spanned)  # two devices of one chip share its links


def kernel_flops(
    runs: Sequence[RunConfig], models: Collection[FrozenModel], cost: ProgramCost, devices: int
) -> float:
    """Returns by formula the FLOPs of attention on one device that the program does not contain.

    They are in custom kernels, or in loops over blocks of keys whose trip count depends on the block of queries.

    Forward takes 4*N*H FLOPs per visible pair of query and key; backward takes 2.5 times as much, since it recomputes
    the scores (FlashAttention-2, arXiv 2307.08691, section 3.1). Rematerialisation adds a forward pass, and each of
    `models`, the frozen ones, another one. Masked pairs that a kernel computes are left out.
    """
    if not cost.kernels and not cost.uncounted:
        return 0.0
    config = runs[0]
    passes = 3.5 + (config.compute.remat != "none")
    flops = passes * sum(attention_flops_per_token(run.model, config.data.seq_len) for run in runs)
    flops += sum(attention_flops_per_token(model.config, config.data.seq_len) for model in models)
    return flops * config.data.batch_size * config.data.seq_len / devices


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs of attention in a forward pass: the formula's total minus the FLOPs of the weights."""
    return forward_flops_per_token(model, seq_len) - 2.0 * count_parameters(model).total


def share_of_peak(model_flops: float, seconds: float, devices: int, topology: Topology) -> float:
    """Returns the model-FLOP utilisation of a step that takes `seconds`."""
    if seconds <= 0 or math.isinf(seconds):
        return 0.0
    return model_flops / (seconds * devices * topology.chip.peak_flops)
