"""Cost of a program on one device: FLOPs of products, memory traffic and bytes sent, with loops multiplied out."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma2_jax.planning.collectives import axes_of, collective_kind, group_of, sent_bytes
from gemma2_jax.planning.hlo import Array, Computation, Instruction, Module, trip_count

# Opcodes without memory traffic.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "domain", "add-dependency", "async-done", "async-update", "copy-done",
    "send-done", "recv-done",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {
    "dynamic-update-slice": 1,
    "scatter": 2,
}  # the operand that they write into the first one, in place
Sent = tuple[str, tuple[str, ...]]  # a collective's kind, and the mesh axes that it runs along


@dataclass
class ProgramCost:
    """The cost of a program on one device.

    Attributes:
        flops: FLOPs of matrix products and convolutions, 2 per multiply-add.
        bytes: bytes that the instructions left after fusion read from and write to memory.
        sent: bytes sent, by kind of collective and mesh axes.
        kernels: number of calls of custom kernels, by target. The program does not contain their FLOPs.
        uncounted: number of loops with an unknown trip count; their bodies are counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: dict[Sent, float] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    uncounted: int = 0

    def add(self, other: "ProgramCost", times: int = 1) -> None:
        """Adds `times` times another cost."""
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        for key, amount in other.sent.items():
            self.send(key, amount * times)
        for name, calls in other.kernels.items():
            self.kernels[name] += calls * times
        self.uncounted += other.uncounted

    def send(self, key: Sent, amount: float) -> None:
        """Adds the bytes that a collective sends."""
        self.sent[key] = self.sent.get(key, 0.0) + amount


def count(module: Module, mesh_shape: dict[str, int]) -> ProgramCost:
    """Returns the cost of a whole program on one device of a mesh."""
    return _Counter(module, mesh_shape).cost_of(module.entry, fused=False)


class _Counter:
    """Computes the cost of each computation once, and adds it for every call."""

    def __init__(self, module: Module, mesh_shape: dict[str, int]) -> None:
        self._module, self._mesh = module, mesh_shape
        self._devices = math.prod(mesh_shape.values())
        self._known: dict[tuple[str, bool], ProgramCost] = {}
        self._read: dict[tuple[str, int], int] = {}

    def cost_of(self, name: str, fused: bool) -> ProgramCost:
        """Returns the cost of a computation. Inside a fusion, instructions cause no memory traffic."""
        if (name, fused) not in self._known:
            total = ProgramCost()
            computation = self._module.computations[name]
            channels: set[str] = set()
            for instruction in computation.instructions.values():
                self._add(total, instruction, computation, fused, channels)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _add(
        self,
        total: ProgramCost,
        instruction: Instruction,
        computation: Computation,
        fused: bool,
        channels: set[str],
    ) -> None:
        """Adds one instruction.

        Args:
            channels: channels of the collectives counted so far in this computation's fusions; updated in place.
        """
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return
        if opcode == "while":
            trips = trip_count(instruction, self._module, computation)
            total.uncounted += trips is None
            total.add(self.cost_of(instruction.attribute("body") or "", fused), 1 if trips is None else trips)
            return
        if opcode == "conditional":
            branches = [self.cost_of(name, fused) for name in instruction.called]
            total.add(max(branches, key=lambda cost: (cost.flops, cost.bytes)))
            return
        kind = collective_kind(instruction)
        if kind is not None:
            if not fused:
                self._add_collective(total, kind, instruction, computation)
        elif opcode in ("call", "async-start"):
            for name in instruction.called:
                total.add(self.cost_of(name, fused))
            return
        elif opcode == "fusion":
            for name in instruction.called:
                total.add(self.cost_of(name, fused=True))
                if not fused:
                    self._add_fused_collectives(total, name, channels)
        elif opcode == "dot":
            total.flops += _dot_flops(instruction, computation)
        elif opcode == "convolution":
            total.flops += _convolution_flops(instruction, computation)
        elif opcode == "custom-call":
            self._add_custom(total, instruction, computation)
        if not fused:
            total.bytes += self._moved(instruction, computation)

    def _add_collective(
        self, total: ProgramCost, kind: str, instruction: Instruction, computation: Computation
    ) -> None:
        group = group_of(instruction, self._devices)
        axes = axes_of(group, self._mesh)
        input_bytes = sum(_size(operand) for operand in _operands(instruction, computation))
        output_bytes = sum(array.size for array in instruction.arrays)
        if instruction.opcode.endswith("-start"):
            output_bytes -= input_bytes  # the result of a -start instruction holds the operands too
        if "all-reduce-scatter" in computation.name and kind == "all-reduce":
            kind = "reduce-scatter"  # the TPU compiler's fusion of an all-reduce and a slice of its result
        total.send((kind, axes), sent_bytes(kind, input_bytes, output_bytes, len(group)))

    def _add_fused_collectives(self, total: ProgramCost, name: str, channels: set[str]) -> None:
        """Adds the asynchronous collectives inside a fusion, each once.

        The TPU compiler repeats such a collective, with the same channel, in the fusion that starts it, in every
        fusion that runs meanwhile, and in the fusion that ends it.
        """
        computation = self._module.computations[name]
        for instruction in computation.instructions.values():
            kind = collective_kind(instruction)
            if instruction.opcode == "fusion":
                for inner in instruction.called:
                    self._add_fused_collectives(total, inner, channels)
            elif kind is not None:
                match = re.search(r"channel_id=(\d+)", instruction.attributes)
                if match is None or match[1] not in channels:
                    self._add_collective(total, kind, instruction, computation)
                if match is not None:
                    channels.add(match[1])

    def _add_custom(self, total: ProgramCost, instruction: Instruction, computation: Computation) -> None:
        match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        target = "" if match is None else match[1]
        if "gemm" in target or "matmul" in target:
            total.flops += _gemm_flops(instruction, computation)
        elif target in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
            total.kernels[target] += 1

    def _moved(self, instruction: Instruction, computation: Computation) -> int:
        """Returns the bytes that an instruction reads from and writes to HBM."""
        if instruction.opcode == "fusion":
            fused = self._module.computations[instruction.called[0]]
            input_bytes = sum(
                min(_hbm(operand), self._bytes_read(fused, index))
                for index, operand in enumerate(_operands(instruction, computation))
            )
            return input_bytes + min(_hbm(instruction), sum(_written(root, fused) for root in _roots(fused)))
        if instruction.opcode in _SLICES:
            return 2 * _hbm(instruction)
        if instruction.opcode in _UPDATES:
            return 2 * _hbm(_update(instruction, computation))
        if instruction.opcode == "copy-start":  # between on-chip memory and HBM, or within HBM
            source = computation.instructions[instruction.operands[0]]
            return _hbm(source) + _hbm_of(instruction.arrays[:1])
        operands = sum(_hbm(operand) for operand in _operands(instruction, computation))
        output_bytes = _hbm(instruction)
        if instruction.opcode.endswith("-start"):
            output_bytes = max(0, output_bytes - operands)
        return operands + output_bytes

    def _bytes_read(self, fused: Computation, index: int) -> int:
        """Returns the bytes of a parameter that a fusion reads: the slices only, if it only slices the parameter."""
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
            elif user.opcode in _UPDATES and user.operands[0] == value.name:
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


def _operands(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    return (
        computation.instructions[name] for name in instruction.operands if name in computation.instructions
    )


def _size(instruction: Instruction) -> int:
    return sum(array.size for array in instruction.arrays)


def _hbm(instruction: Instruction) -> int:
    return _hbm_of(instruction.arrays)


def _hbm_of(arrays: Sequence[Array]) -> int:
    return sum(array.size for array in arrays if not array.on_chip)


def _roots(fused: Computation) -> list[Instruction]:
    root = fused.root
    return list(_operands(root, fused)) if root.opcode == "tuple" else [root]


def _written(root: Instruction, fused: Computation) -> int:
    """Returns the bytes of a result that a fusion writes: the update only, if it updates the result in place."""
    while root.opcode == "bitcast" and root.operands[0] in fused.instructions:
        root = fused.instructions[root.operands[0]]
    return _size(_update(root, fused) if root.opcode in _UPDATES else root)


def _update(instruction: Instruction, computation: Computation) -> Instruction:
    """Returns what an instruction of `_UPDATES` writes into its first operand."""
    return computation.instructions[instruction.operands[_UPDATES[instruction.opcode]]]


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = computation.instructions[instruction.operands[0]].shape
    contracted = math.prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(instruction.shape) * contracted


def _gemm_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a library's matrix product, whose dimensions are in its backend_config."""
    match = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
    if match is None:
        return 0.0
    left = computation.instructions[instruction.operands[0]].shape
    contracted = math.prod(left[int(axis)] for axis in json.loads(match[1]))
    return 2.0 * math.prod(instruction.shape) * contracted


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a convolution as XLA's HloCostAnalysis::HandleConvolution counts them, without padding.

    The TPU compiler writes matrix products as convolutions, with batch dimensions as spatial dimensions.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    left, kernel, outputs = (
        computation.instructions[instruction.operands[0]].shape,
        computation.instructions[instruction.operands[1]].shape,
        instruction.shape,
    )
    window = {name: text.split("x") for name, text in re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction))}
    valid = 1
    for axis in range(len(outputs) - 2):
        spatial = str(axis)

        def setting(name: str, default: str, axis: int = axis) -> str:
            return window.get(name, [default] * (axis + 1))[axis]

        valid *= _valid_positions(
            size=left[labels[1].index(spatial)],
            kernel=kernel[labels[2].index(spatial)],
            outputs=outputs[labels[3].index(spatial)],
            stride=int(setting("stride", "1")),
            padding=int(setting("pad", "0_0").split("_")[0]),
            left_dilation=int(setting("lhs_dilate", "1")),
            kernel_dilation=int(setting("rhs_dilate", "1")),
        )
    # The kernel's input features are already those of a single group.
    features = kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
    match = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left[labels[1].index("b")] // (int(match[1]) if match else 1)
    return 2.0 * features * batch * valid


def _window(instruction: Instruction) -> str:
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    return "" if match is None else match[1]


def _valid_positions(
    size: int, kernel: int, outputs: int, stride: int, padding: int, left_dilation: int, kernel_dilation: int
) -> int:
    """Returns the number of (output, kernel) position pairs that read an input element, not padding or a hole."""
    if kernel == 1 and padding == 0 and left_dilation == 1:
        return outputs
    total = 0
    places = np.arange(outputs, dtype=np.int64) * stride - padding
    for offset in range(kernel):
        at = places + offset * kernel_dilation
        total += int(np.sum((at >= 0) & (at % left_dilation == 0) & (at // left_dilation < size)))
    return total
