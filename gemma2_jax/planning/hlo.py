"""Parser for the text of an optimised program (`compiled.as_text()`): computations and their instructions.

The text can be tens of megabytes, so each line is parsed once, and only as far as counting needs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# Bits per element. Types that are not listed (token, opaque) take no memory.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(?:(ENTRY)\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)])([a-z][a-z0-9\-]*)\(")
_TUPLE_END = re.compile(r"\)\s([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
        size: size in bytes.
        on_chip: whether the array is in on-chip memory (a TPU's VMEM) instead of HBM.
    """

    shape: tuple[int, ...]
    size: int
    on_chip: bool


@dataclass
class Instruction:
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    type_text: str
    operand_text: str

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result; a tuple is flattened."""
        return tuple(_arrays(self.type_text))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[0].shape

    def attribute(self, name: str) -> str | None:
        """Returns the name of the computation in the attribute `name=%…`, or None without that attribute."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return None if match is None else match[1]

    def numbers(self, name: str) -> tuple[int, ...]:
        """Returns the numbers in the attribute `name={1,2}`; empty without that attribute."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return () if match is None or not match[1] else tuple(int(text) for text in match[1].split(","))

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction calls: by `calls`, by `to_apply`, or as branches."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match is not None:
            return _NAME.findall(match[1])
        names = ("calls", "to_apply", "true_computation", "false_computation", "called_computations")
        return [found for name in names if (found := self.attribute(name)) is not None]


class Computation:
    """A computation: its instructions by name, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions: dict[str, Instruction] = {}

    @cached_property
    def root(self) -> Instruction:
        instructions = list(self.instructions.values())
        return next((instruction for instruction in instructions if instruction.is_root), instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {
            int(instruction.operand_text): instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        }

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each instruction's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


@dataclass(frozen=True)
class Module:
    """A whole program: the name of its entry computation, and all computations by name."""

    entry: str
    computations: dict[str, Computation]


def read_program(text: str) -> Module:
    """Parses a program's text.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Attributes may span several lines, closing braces included: only a header starts a new computation.
        if line.startswith(("%", "ENTRY")):
            match = _COMPUTATION.match(line)
            if match is not None:
                current = computations[match[2]] = Computation(match[2])
                entry = match[2] if match[1] else entry
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is not an HLO program: it has no entry computation")
    return Module(entry, computations)


def trip_count(loop: Instruction, module: Module, computation: Computation) -> int | None:
    """Returns how often the body of a while loop runs; None if the program does not determine it.

    The compiler may state the count in the loop's backend_config. Otherwise the count is derived from a counter that is
    compared with a constant and incremented by a constant (by 2 where the compiler has unrolled the loop once). The
    counter starts from a constant, or else from 0. A loop that its body ends by setting its condition to false counts
    as one iteration, though it may have none.

    Args:
        computation: the computation that contains the loop.
    """
    match = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
    if match is not None:
        return int(match[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    compare = condition.root
    if _is_ended_by(body, compare):
        return 1
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (condition.instructions[name] for name in compare.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or place is None or _constant(limit) is None:
        return None
    index = int(place[1])
    raised = body.instructions[body.root.operands[index]]
    steps = [_constant(body.instructions[name]) for name in raised.operands]
    step = next((value for value in steps if value), None) if raised.opcode == "add" else None
    initial = computation.instructions.get(loop.operands[0])
    begin = None
    if initial is not None and initial.opcode == "tuple":
        begin = _constant(computation.instructions[initial.operands[index]])
    if not step or step < 0:
        return None
    return max(0, -(-((_constant(limit) or 0) - (begin or 0)) // step))


def _is_ended_by(body: Computation, condition: Instruction) -> bool:
    """Whether a loop's condition is an element of its carry, which the body sets to false."""
    place = re.search(r"index=(\d+)", condition.attributes)
    if condition.opcode != "get-tuple-element" or place is None:
        return False
    found = body.instructions[body.root.operands[int(place[1])]]
    while found.opcode == "copy":
        found = body.instructions[found.operands[0]]
    return found.opcode == "constant" and found.operand_text == "false"


def _constant(instruction: Instruction) -> int | None:
    match = re.fullmatch(r"-?\d+", instruction.operand_text) if instruction.opcode == "constant" else None
    return None if match is None else int(match[0])


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = match[3]
    opcode = (_TUPLE_END if rest.startswith("(") else _OPCODE).search(rest)
    if opcode is None:
        return None
    begin = opcode.end()
    end = _closing(rest, begin)
    inner = rest[begin:end]
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        operands=tuple(_NAME.findall(inner)),
        attributes=rest[end + 1 :],
        is_root=match[1] is not None,
        type_text=rest[: opcode.start(1)],
        operand_text=inner,
    )


def _closing(text: str, begin: int) -> int:
    """Returns the index of the parenthesis that closes the one opened just before `begin`."""
    depth, place = 1, begin
    while True:
        close = text.find(")", place)
        if close < 0:
            return len(text)
        depth += text.count("(", place, close) - 1
        place = close + 1
        if depth == 0:
            return close


def _arrays(text: str) -> Iterator[Array]:
    for kind, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        size = math.prod(shape) * _BITS.get(kind, 0) // 8
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(shape, size, space is not None and space[1] != "0")
