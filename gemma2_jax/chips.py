"""The table of accelerators: peak FLOPs, memory and bandwidths, from their makers' documentation.

Figures are per device as JAX counts devices: one chip, except for TPU7x, where a chip is two devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kinds: JAX's names for it (`device_kind`), or prefixes of them.
        peak_flops: dense bfloat16 FLOPs per second.
        memory: bytes of HBM: for TPUs, what the compiler lets a program use; for GPUs, what the driver reports, of
            which JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
        memory_bandwidth: HBM bandwidth in bytes per second.
        link_bandwidth: bytes per second that it sends in one direction over the fast links to other devices: for TPUs
            over one link (there are two along each dimension of the torus), for GPUs over all of NVLink.
        network_bandwidth: bytes per second that it sends in one direction over the data-centre network.
        dimensions: dimensions of the torus of links; 0 where every device of a node reaches every other (NVLink).
    """

    kinds: tuple[str, ...]
    peak_flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int


# TPUs: peaks and bandwidths from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The bandwidth of a link in one
# direction is the "bidirectional ICI bandwidth per chip" divided by the number of ports and by two. Where a page has no
# network figure per chip, it is the pod's divided by its chips. Memory is the limit that libtpu 0.0.42 reports in its
# out-of-memory error.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200. NVLink is half of the sheet's total. The
# network is one adapter per GPU, as in DGX systems: 200 Gbit/s with A100, 400 Gbit/s with the others.
CHIPS: Mapping[str, Chip] = {
    # 6 links of 50 GB/s (Jouppi et al., arXiv 2304.01433, table 4). The page has no network figure: 25 Gbit/s per chip,
    # as for v5e, is an assumption.
    "v4": Chip(("TPU v4",), 275e12, int(30.75 * _GIB), 1200e9, 50e9, 25e9 / 8, 3),
    # 400 GB/s over 4 ports; 6.4 Tbit/s for 256 chips.
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 819e9, 50e9, 25e9 / 8, 2),
    # 1200 GB/s over 6 ports; 50 Gbit/s per chip.
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2765e9, 100e9, 50e9 / 8, 3),
    # 800 GB/s over 4 ports; 25.6 Tbit/s for 256 chips.
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * _GIB), 1638e9, 100e9, 100e9 / 8, 2),
    # Per chip: 2307 TFLOPs, 7380 GB/s, 1200 GB/s over 6 ports, 100 Gbit/s. A chip is two devices.
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
