"""What the accelerators' makers say of them: the one table of peaks, bandwidths and memories.

Figures are those of one device as JAX counts them, which is a chip, but for TPU7x, whose chips are two devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kinds: how JAX names it (`device_kind`), or how the names begin.
        peak_flops: dense bfloat16 FLOPs per second.
        memory: bytes of HBM: of TPUs what their compiler lets a program use, of GPUs what the driver tells, of which
            JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
        memory_bandwidth: bytes per second, HBM.
        link_bandwidth: bytes per second that it sends over its fast links to others of its kind, in one direction:
            of TPUs over one link (there are two along each dimension of the torus), of GPUs over all of NVLink.
        network_bandwidth: bytes per second that it sends over the data-centre network, in one direction.
        dimensions: of the torus of links; 0 where every device of a node reaches every other (NVLink).
    """

    kinds: tuple[str, ...]
    peak_flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int


# TPUs: peaks and bandwidths from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A link's bandwidth in one
# direction is the "bidirectional ICI bandwidth per chip" over its ports and over two; the network's is the pod's over
# its chips where the page gives no figure of a chip. Memory is what libtpu 0.0.42 tells in its out-of-memory error.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200. NVLink's figure is the sheet's total
# over two. The network is one adapter a GPU as in DGX systems: 200 Gbit/s with A100, 400 Gbit/s with the others.
CHIPS: Mapping[str, Chip] = {
    # Links: 6 of 50 GB/s (Jouppi et al., arXiv 2304.01433, table 4). The page has no figure of the network: 25 Gbit/s
    # a chip, as v5e has it, is an assumption.
    "v4": Chip(("TPU v4",), 275e12, int(30.75 * _GIB), 1200e9, 50e9, 25e9 / 8, 3),
    # 400 GB/s over 4 ports; 6.4 Tbit/s for 256 chips.
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 819e9, 50e9, 25e9 / 8, 2),
    # 1200 GB/s over 6 ports; 50 Gbit/s a chip.
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2765e9, 100e9, 50e9 / 8, 3),
    # 800 GB/s over 4 ports; 25.6 Tbit/s for 256 chips.
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * _GIB), 1638e9, 100e9, 100e9 / 8, 2),
    # A chip: 2307 TFLOPs, 7380 GB/s, 1200 GB/s over 6 ports, 100 Gbit/s; two devices share it.
    "tpu7x": Chip(("TPU7x",), 2307e12 / 2, int(94.75 * _GIB), 7380e9 / 2, 100e9 / 2, 100e9 / 8 / 2, 3),
    "a100": Chip(("NVIDIA A100",), 312e12, 85_899_345_920, 2039e9, 300e9, 25e9, 0),
    "h100": Chip(("NVIDIA H100",), 989e12, 84_929_347_584, 3352e9, 450e9, 50e9, 0),
    "h200": Chip(("NVIDIA H200",), 989e12, 143_771 * 2**20, 4800e9, 450e9, 50e9, 0),
    "b200": Chip(("NVIDIA B200",), 2250e12, 183_359 * 2**20, 8000e9, 900e9, 50e9, 0),
}


def chip_of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`, or None if it is not in the table."""
    matches = [(name, chip) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)]
    return max(matches, key=lambda match: len(match[0]))[1] if matches else None
