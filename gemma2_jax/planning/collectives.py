"""Which mesh axes a collective goes along, and the bytes that each device sends in it."""

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


def collective_kind(one: Instruction) -> str | None:
    """The kind of a collective, asynchronous ones taken at their start; None for anything else."""
    kind = one.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def group_of(one: Instruction, devices: int) -> list[int]:
    """Devices, by their place in the mesh, of one of the groups that exchange among themselves; all groups are alike.

    Reads lists (`{{0,1},{2,3}}`), reshaped ranges (`[4,4]<=[16]`, `[4,4]<=[4,4]T(1,0)`), axes of a mesh
    (`mesh['a'=4,'b'=2] {'b'}`), and of a permutation all sources and targets of its first cycle.
    """
    text = one.attributes
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


def sent_bytes(kind: str, taken: int, given: int, count: int) -> float:
    """Bytes that each of `count` devices sends by a ring (Thakur et al., Int. J. HPC Applications 19, 2005).

    Args:
        taken, given: bytes that the collective takes of a device, and gives to it.
    """
    if count < 2:
        return 0.0
    others = (count - 1) / count
    if kind == "all-gather":
        return given * others
    if kind == "all-reduce":
        return 2 * taken * others
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return taken * others
    return float(taken)


def _cycle(text: str) -> list[int]:
    following = {int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)\}", text)}
    begin = next((source for source, target in following.items() if source != target), 0)
    found, place = [begin], following.get(begin, begin)
    while place not in found:
        found.append(place)
        place = following.get(place, begin)
    return found


def _along_axes(sizes: str, chosen: str) -> list[int]:
    """The group of device 0 in a mesh given as `'a'=4,'b'=2`, along axes `'b'`, or a part of one, `'a':(2)2`."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    places = np.arange(int(np.prod(list(shape.values())))).reshape(tuple(shape.values()))
    taken: list[slice] = [slice(0, 1)] * len(shape)
    names = list(shape)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        step = shape[name] // (int(before) * int(size)) if size else 1
        stop = step * int(size) if size else shape[name]
        taken[names.index(name)] = slice(0, stop, step)
    group: list[int] = places[tuple(taken)].ravel().tolist()
    return group


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
