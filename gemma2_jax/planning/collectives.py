"""The mesh axes that a collective runs along, and the bytes that each device sends in it."""

import re
from collections.abc import Sequence

import numpy as np

from gemma2_jax.planning.hlo import Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def collective_kind(instruction: Instruction) -> str | None:
    """Returns the kind of a collective, or None for any other instruction.

    An asynchronous collective counts at its `-start` instruction only.
    """
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def group_of(instruction: Instruction, devices: int) -> list[int]:
    """Returns one replica group of a collective, as flat indices of devices in the mesh; all groups are alike.

    Parses lists (`{{0,1},{2,3}}`), reshaped ranges (`[4,4]<=[16]`, `[4,4]<=[4,4]T(1,0)`) and mesh axes
    (`mesh['a'=4,'b'=2] {'b'}`). For a permutation, the group is its first cycle.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs is not None:
        return _cycle(pairs[1])
    ranges = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if ranges is not None:
        places = np.arange(devices).reshape(_numbers(ranges[2]))
        if ranges[3]:
            places = places.transpose(_numbers(ranges[3]))
        first: list[int] = places.reshape(_numbers(ranges[1]))[0].tolist()
        return first
    mesh = re.search(
        r"replica_groups=@?\w*mesh\[([^\]]*)\](?:,\s*device_ids=\(([^)]*)\))?\s*\{([^}]*)\}", text
    )
    if mesh is not None:
        return _along_axes(mesh[1], mesh[3])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return list(_numbers(listed[1])) if listed is not None else list(range(devices))


def axes_of(group: Sequence[int], shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.array(group), tuple(shape.values()))
    return tuple(axis for axis, along in zip(shape, places, strict=True) if len(np.unique(along)) > 1)


def sent_bytes(kind: str, input_bytes: int, output_bytes: int, count: int) -> float:
    """Returns the bytes that each of `count` devices sends in a ring algorithm.

    Formulas from Thakur et al., Int. J. HPC Applications 19, 2005.

    Args:
        input_bytes, output_bytes: size of the collective's input and output on one device.
    """
    if count < 2:
        return 0.0
    others = (count - 1) / count
    if kind == "all-gather":
        return output_bytes * others
    if kind == "all-reduce":
        return 2 * input_bytes * others
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return input_bytes * others
    return float(input_bytes)


def _cycle(text: str) -> list[int]:
    following = {int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)\}", text)}
    begin = next((source for source, target in following.items() if source != target), 0)
    found, place = [begin], following.get(begin, begin)
    while place not in found:
        found.append(place)
        place = following.get(place, begin)
    return found


def _along_axes(sizes: str, axes: str) -> list[int]:
    """Returns the group of device 0.

    Args:
        sizes: mesh shape, such as `'a'=4,'b'=2`.
        axes: axes that the group spans, such as `'b'`, or a part of an axis, such as `'a':(2)2`.
    """
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    places = np.arange(int(np.prod(list(shape.values())))).reshape(tuple(shape.values()))
    slices: list[slice] = [slice(0, 1)] * len(shape)
    names = list(shape)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        step = shape[name] // (int(before) * int(size)) if size else 1
        stop = step * int(size) if size else shape[name]
        slices[names.index(name)] = slice(0, stop, step)
    group: list[int] = places[tuple(slices)].ravel().tolist()
    return group


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
