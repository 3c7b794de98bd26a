"""What one device does in a program: FLOPs of products, bytes of memory, bytes sent, loops by their trip counts."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma2_jax.planning.collectives import axes_of, collective_kind, group_of, sent_bytes
from gemma2_jax.planning.hlo import Array, Computation, Instruction, Module, trip_count

# What moves nothing by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "domain", "add-dependency", "async-done", "async-update", "copy-done",
    "send-done", "recv-done",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
Sent = tuple[str, tuple[str, ...]]  # a collective's kind, and the mesh axes that it goes along


@dataclass
class ProgramCost:
    """Of one device.

    Attributes:
        flops: of matrix products and convolutions, 2 for each multiply-add.
        bytes: read from and written to memory by each instruction that is left after fusion.
        sent: bytes by kind of collective and mesh axes.
        kernels: calls of custom kernels, whose FLOPs are not in the program, by target.
        uncounted: loops whose trip count the program does not tell, counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: dict[Sent, float] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    uncounted: int = 0

    def add(self, other: "ProgramCost", times: int = 1) -> None:
        """Adds another's cost so many times."""
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        for key, amount in other.sent.items():
            self.send(key, amount * times)
        for name, calls in other.kernels.items():
            self.kernels[name] += calls * times
        self.uncounted += other.uncounted

    def send(self, key: Sent, amount: float) -> None:
        """Adds bytes that a collective sends."""
        self.sent[key] = self.sent.get(key, 0.0) + amount


def count(module: Module, mesh_shape: dict[str, int]) -> ProgramCost:
    """The cost of a whole program on a mesh."""
    return _Counter(module, mesh_shape).of(module.entry, fused=False)


class _Counter:
    """Each computation is counted once, and added as often as it is called."""

    def __init__(self, module: Module, mesh_shape: dict[str, int]) -> None:
        self._module, self._mesh = module, mesh_shape
        self._devices = math.prod(mesh_shape.values())
        self._known: dict[tuple[str, bool], ProgramCost] = {}
        self._read: dict[tuple[str, int], int] = {}

    def of(self, name: str, fused: bool) -> ProgramCost:
        """The cost of a computation; within a fusion nothing but its ends touches memory."""
        if (name, fused) not in self._known:
            total = ProgramCost()
            computation = self._module.computations[name]
            channels: set[str] = set()
            for one in computation.instructions.values():
                self._add(total, one, computation, fused, channels)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _add(
        self, total: ProgramCost, one: Instruction, inside: Computation, fused: bool, channels: set[str]
    ) -> None:
        """Adds one instruction; `channels` are those of collectives that this computation's fusions have begun."""
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return
        if opcode == "while":
            trips = trip_count(one, self._module, inside)
            total.uncounted += trips is None
            total.add(self.of(one.attribute("body") or "", fused), 1 if trips is None else trips)
            return
        if opcode == "conditional":
            branches = [self.of(name, fused) for name in one.called]
            total.add(max(branches, key=lambda cost: (cost.flops, cost.bytes)))
            return
        kind = collective_kind(one)
        if kind is not None:
            if not fused:
                self._add_collective(total, kind, one, inside)
        elif opcode in ("call", "async-start"):
            for name in one.called:
                total.add(self.of(name, fused))
            return
        elif opcode == "fusion":
            for name in one.called:
                total.add(self.of(name, fused=True))
                if not fused:
                    self._add_fused_collectives(total, name, channels)
        elif opcode == "dot":
            total.flops += _dot_flops(one, inside)
        elif opcode == "convolution":
            total.flops += _convolution_flops(one, inside)
        elif opcode == "custom-call":
            self._add_custom(total, one, inside)
        if not fused:
            total.bytes += self._moved(one, inside)

    def _add_collective(self, total: ProgramCost, kind: str, one: Instruction, inside: Computation) -> None:
        group = group_of(one, self._devices)
        axes = axes_of(group, self._mesh)
        taken = sum(_size(operand) for operand in _operands(one, inside))
        given = sum(array.size for array in one.arrays)
        if one.opcode.endswith("-start"):
            given -= taken  # what it gives is both
        if "all-reduce-scatter" in inside.name and kind == "all-reduce":
            kind = "reduce-scatter"  # a TPU's fusion of an all-reduce and the slice that is kept
        total.send((kind, axes), sent_bytes(kind, taken, given, len(group)))

    def _add_fused_collectives(self, total: ProgramCost, name: str, channels: set[str]) -> None:
        """A TPU's asynchronous collective stands in the fusion that begins it, in all that go on meanwhile, and in the
        one that ends it, each time with the same channel: it is counted once."""
        inside = self._module.computations[name]
        for one in inside.instructions.values():
            kind = collective_kind(one)
            if one.opcode == "fusion":
                for inner in one.called:
                    self._add_fused_collectives(total, inner, channels)
            elif kind is not None:
                match = re.search(r"channel_id=(\d+)", one.attributes)
                if match is None or match[1] not in channels:
                    self._add_collective(total, kind, one, inside)
                if match is not None:
                    channels.add(match[1])

    def _add_custom(self, total: ProgramCost, one: Instruction, inside: Computation) -> None:
        match = re.search(r'custom_call_target="([^"]*)"', one.attributes)
        target = "" if match is None else match[1]
        if "gemm" in target or "matmul" in target:
            total.flops += _gemm_flops(one, inside)
        elif target in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
            total.kernels[target] += 1

    def _moved(self, one: Instruction, inside: Computation) -> int:
        """Bytes that an instruction reads and writes."""
        if one.opcode == "fusion":
            fused = self._module.computations[one.called[0]]
            taken = sum(
                min(_hbm(operand), self._bytes_read(fused, index))
                for index, operand in enumerate(_operands(one, inside))
            )
            return taken + min(_hbm(one), sum(_written(root, fused) for root in _roots(fused)))
        if one.opcode in _SLICES:
            return 2 * _hbm(one)
        if one.opcode == "dynamic-update-slice":
            return 2 * _hbm(inside.instructions[one.operands[1]])
        if one.opcode == "copy-start":  # into or out of a memory of the chip's own, or within HBM
            source = inside.instructions[one.operands[0]]
            return _hbm(source) + _hbm_of(one.arrays[:1])
        operands = sum(_hbm(operand) for operand in _operands(one, inside))
        given = _hbm(one)
        if one.opcode.endswith("-start"):
            given = max(0, given - operands)
        return operands + given

    def _bytes_read(self, fused: Computation, index: int) -> int:
        """How much of its parameter a fusion reads: of one that it only slices, the slices."""
        key = (fused.name, index)
        if key not in self._read:
            parameter = fused.parameters.get(index)
            self._read[key] = 0 if parameter is None else self._bytes_used(parameter, fused)
        return self._read[key]

    def _bytes_used(self, value: Instruction, fused: Computation) -> int:
        whole, total = _size(value), 0
        for user in fused.users.get(value.name, []):
            if user.opcode in _SLICES and user.operands[0] == value.name:
                total += _size(user)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # written in place
            elif user.opcode == "bitcast":
                total += self._bytes_used(user, fused)
            elif user.opcode == "fusion":
                inner = self._module.computations[user.called[0]]
                places = [place for place, name in enumerate(user.operands) if name == value.name]
                total += sum(self._bytes_read(inner, place) for place in places)
            else:
                return whole
        return min(whole, total)


def _operands(one: Instruction, inside: Computation) -> Iterator[Instruction]:
    return (inside.instructions[name] for name in one.operands if name in inside.instructions)


def _size(one: Instruction) -> int:
    return sum(array.size for array in one.arrays)


def _hbm(one: Instruction) -> int:
    return _hbm_of(one.arrays)


def _hbm_of(arrays: Sequence[Array]) -> int:
    return sum(array.size for array in arrays if not array.on_chip)


def _roots(fused: Computation) -> list[Instruction]:
    root = fused.root
    return list(_operands(root, fused)) if root.opcode == "tuple" else [root]


def _written(root: Instruction, fused: Computation) -> int:
    """Bytes that a fusion writes of a result: of one that it updates in place, the update."""
    while root.opcode == "bitcast" and root.operands[0] in fused.instructions:
        root = fused.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _size(fused.instructions[root.operands[1]])
    return _size(root)


def _dot_flops(one: Instruction, inside: Computation) -> float:
    left = inside.instructions[one.operands[0]].shape
    contracted = math.prod(left[axis] for axis in one.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(one.shape) * contracted


def _gemm_flops(one: Instruction, inside: Computation) -> float:
    """Of a library's matrix product, whose dimensions stand in its backend_config."""
    match = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', one.attributes)
    if match is None:
        return 0.0
    left = inside.instructions[one.operands[0]].shape
    contracted = math.prod(left[int(axis)] for axis in json.loads(match[1]))
    return 2.0 * math.prod(one.shape) * contracted


def _convolution_flops(one: Instruction, inside: Computation) -> float:
    """As XLA's HloCostAnalysis::HandleConvolution counts: products with padding are none.

    The TPU's compiler writes matrix products as convolutions, their batch dimensions as spatial ones.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None, one.name
    left, kernel, given = (
        inside.instructions[one.operands[0]].shape,
        inside.instructions[one.operands[1]].shape,
        one.shape,
    )
    window = {name: text.split("x") for name, text in re.findall(r"(\w+)=([\dx_\-]+)", _window(one))}
    valid = 1
    for axis in range(len(given) - 2):
        spatial = str(axis)

        def setting(name: str, default: str, axis: int = axis) -> str:
            return window.get(name, [default] * (axis + 1))[axis]

        valid *= _valid_positions(
            size=left[labels[1].index(spatial)],
            kernel=kernel[labels[2].index(spatial)],
            outputs=given[labels[3].index(spatial)],
            stride=int(setting("stride", "1")),
            padding=int(setting("pad", "0_0").split("_")[0]),
            left_dilation=int(setting("lhs_dilate", "1")),
            kernel_dilation=int(setting("rhs_dilate", "1")),
        )
    # The kernel's input features are those of one group already.
    features = kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
    match = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch = left[labels[1].index("b")] // (int(match[1]) if match else 1)
    return 2.0 * features * batch * valid


def _window(one: Instruction) -> str:
    match = re.search(r"window=\{([^}]*)\}", one.attributes)
    return "" if match is None else match[1]


def _valid_positions(
    size: int, kernel: int, outputs: int, stride: int, padding: int, left_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a kernel position that meet an input instead of padding or a hole."""
    if kernel == 1 and padding == 0 and left_dilation == 1:
        return outputs
    total = 0
    places = np.arange(outputs, dtype=np.int64) * stride - padding
    for offset in range(kernel):
        at = places + offset * kernel_dilation
        total += int(np.sum((at >= 0) & (at % left_dilation == 0) & (at // left_dilation < size)))
    return total
