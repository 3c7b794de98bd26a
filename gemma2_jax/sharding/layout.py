"""The layout: which dimensions of arrays are split along which mesh axes. This is the package's only such table.

The layout of an array depends on its use: a weight at rest, an activation between blocks, the embedding during the
lookup of tokens, or the LM head, where tokens meet the whole vocabulary. The last two follow from the first two:

- For the lookup, each device looks up all tokens in its own columns of the embedding, and then the results are
  redistributed. So no device ever holds the whole table or the table's whole gradient.
- In the LM head, each device computes the logits of its own rows of the vocabulary, for the tokens of all devices that
  share the rows among them. That takes less memory than gathering the table. It also sends less, as long as these are
  at most some 40 devices: their hidden states are then smaller than the table and its float32 gradient.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gemma2_jax.config import UserError, suggest
from gemma2_jax.sharding.mesh import AXES

Axes = tuple[str, ...]
Tree = TypeVar("Tree")

# All kinds of activations. Two letters of one kind cannot be split along the same mesh axis.
_ACTIVATIONS = ("BTD", "BTNH", "BTKH", "BTF", "BTV")


def _weights() -> dict[str, Axes]:
    return {"D": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


def _activations() -> dict[str, Axes]:
    return {
        "B": ("replica", "data", "fsdp"),
        "T": ("sequence",),
        "N": ("tensor",),
        "K": ("tensor",),
        "F": ("tensor",),
        "V": ("tensor",),
    }


@dataclass(frozen=True)
class LayoutConfig:
    """Mesh axes by the letter of a dimension (see `gemma2_jax`); a letter without an entry is never split.

    Attributes:
        weights: axes of weights, their gradients and moments, at rest.
        activations: axes of activations, and of weights gathered for use.
        head: axes that split the vocabulary within the LM head and its loss; tokens are split along the remaining axes
            of B and T.
    """

    weights: dict[str, Axes] = field(default_factory=_weights)
    activations: dict[str, Axes] = field(default_factory=_activations)
    head: Axes = ("tensor", "sequence", "fsdp")

    def __post_init__(self) -> None:
        columns = {"weights": (self.weights, "DNKFHV"), "activations": (self.activations, "BTDNKHFV")}
        for name, (column, letters) in columns.items():
            for letter, axes in column.items():
                if letter not in letters:
                    raise UserError(f"there is no letter layout.{name}.{letter}, {suggest(letter, letters)}.")
                _check_axes(f"layout.{name}.{letter}", axes)
        _check_axes("layout.head", self.head)
        for dims in _ACTIVATIONS:
            _check_collisions("layout.activations", dims, self.activations)

    def spec_of_weight(self, dims: str) -> PartitionSpec:
        """The partition spec of a weight with these dimensions, at rest."""
        _check_collisions("layout.weights", dims, self.weights)
        return _spec(dims, self.weights)

    def spec(self, dims: str) -> PartitionSpec:
        """The partition spec of an activation with these dimensions."""
        return _spec(dims, self.activations)

    def spec_in_head(self, dims: str) -> PartitionSpec:
        """The partition spec of an array within the LM head: V along `head`, tokens along the remaining axes.

        The letter R stands for the parts into which the rows are split there.
        """
        tokens = self.tokens_without(self.head)
        return _spec(dims, {"V": self.head, "R": tokens["B"], **tokens})

    def spec_of_lookup(self, dims: str) -> PartitionSpec:
        """The partition spec while tokens are looked up in the embedding: V and D as in the weights."""
        columns = self.weights.get("D", ())
        return _spec(dims, {"V": self.weights.get("V", ()), "D": columns, **self.tokens_without(columns)})

    def tokens_without(self, taken: Axes) -> dict[str, Axes]:
        """The mesh axes of B and of T, without those in `taken`."""
        return {
            letter: tuple(axis for axis in self.activations.get(letter, ()) if axis not in taken)
            for letter in "BT"
        }


@dataclass(frozen=True)
class _InUse:
    """A layout, with the names of its setting and of its model for messages."""

    layout: LayoutConfig
    key: str
    model: str


_IN_USE: ContextVar[_InUse | None] = ContextVar("layout", default=None)


@contextmanager
def laid_out(layout: LayoutConfig, key: str = "layout", model: str = "the model") -> Iterator[None]:
    """Applies `layout` to everything traced inside, as `jax.set_mesh` applies a mesh.

    So a teacher can have another layout than its student, in one step and on one mesh.

    Args:
        key, model: names for messages: the setting that `layout` comes from, and the model that it is for.
    """
    token = _IN_USE.set(_InUse(layout, key, model))
    try:
        yield
    finally:
        _IN_USE.reset(token)


def layout_in_use() -> LayoutConfig:
    """The layout of the innermost `laid_out`; the default layout outside."""
    return _in_use().layout


def key_in_use() -> str:
    """The setting that `layout_in_use` comes from, for messages."""
    return _in_use().key


def model_in_use() -> str:
    """The model that the innermost `laid_out` is for, for messages."""
    return _in_use().model


def weight_sharding(mesh: Mesh, path: str, dims: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight at rest.

    Raises:
        UserError: mesh axes do not divide the dimension that they split, or would split two dimensions.
    """
    layout = layout_in_use()
    for d, size in zip(dims, shape, strict=True):
        axes = layout.weights.get(d, ())
        shares = math.prod(mesh.shape[axis] for axis in axes)
        if size % shares:
            raise UserError(
                f"{' x '.join(f'mesh.{axis}' for axis in axes)} is {shares}, which does not divide dimension {d} "
                f"({size}) of {model_in_use()} ({path}); choose a divisor of {size}."
            )
    return NamedSharding(mesh, layout.spec_of_weight(dims))


def even_weight_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """As `weight_sharding`, but a dimension that mesh axes do not divide is whole on each device."""
    weights = layout_in_use().weights
    divided = [
        d if size % _shares(weights.get(d, ()), mesh) == 0 else "_"
        for d, size in zip(dims, shape, strict=True)
    ]
    return NamedSharding(mesh, layout_in_use().spec_of_weight("".join(divided)))


def check_activations(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises UserError if mesh axes do not divide a model's dimensions that they split in activations or the LM head.

    Args:
        sizes: sizes of the letters N, K, F and V.
    """
    layout, setting = layout_in_use(), key_in_use()
    columns = {f"{setting}.activations.{d}": (d, layout.activations.get(d, ())) for d in "NKFV"}
    for key, (letter, axes) in {**columns, f"{setting}.head": ("V", layout.head)}.items():
        shares = math.prod(mesh.shape[axis] for axis in axes)
        if sizes[letter] % shares:
            split = " x ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)
            raise UserError(
                f"{key} splits dimension {letter} ({sizes[letter]}) of {model_in_use()} along {split}, which is "
                f"{shares} and does not divide it; choose a divisor"
                f"{', or layout=gathered' if key == 'layout.head' else ''}."
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [B, ...] when it is fed."""
    return NamedSharding(mesh, layout_in_use().spec("B"))


def on_mesh(rows: Tree, mesh: Mesh) -> Tree:
    """Global arrays over the mesh, made from this process's rows of arrays [B, ...], such as those of a batch."""
    sharding = batch_sharding(mesh)
    placed: Tree = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
    return placed


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Fixes the layout of an activation (or a weight gathered for use); without a mesh, does nothing.

    `dims` names x's axes by letter: `constrain(queries, "BTNH")`.
    """
    return _lay_out(x, layout_in_use().spec(dims))


def constrain_weight(x: jax.Array, dims: str) -> jax.Array:
    """Fixes the layout of a gradient to that of its weight; without a mesh, does nothing."""
    return _lay_out(x, layout_in_use().spec_of_weight(dims))


def constrain_in_head(x: jax.Array, dims: str) -> jax.Array:
    """`constrain` for arrays of the LM head and its loss."""
    return _lay_out(x, layout_in_use().spec_in_head(dims))


def constrain_in_lookup(x: jax.Array, dims: str) -> jax.Array:
    """`constrain` for the embedding's input side."""
    return _lay_out(x, layout_in_use().spec_of_lookup(dims))


def batch_shares(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of parts into which a batch's rows are split, on `mesh` or the mesh in context; 1 without a mesh."""
    return _shares(layout_in_use().activations.get("B", ()), mesh)


def sequence_shares(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of parts into which each sequence is split."""
    return _shares(layout_in_use().activations.get("T", ()), mesh)


def batch_shares_in_head() -> int:
    """The number of parts into which rows are still split within the LM head, on the mesh in context."""
    layout = layout_in_use()
    return _shares(layout.tokens_without(layout.head)["B"], None)


def is_split(dimension: str) -> bool:
    """Whether this dimension of weights is split over devices, on the mesh in context."""
    return _shares(layout_in_use().weights.get(dimension, ()), None) > 1


def _in_use() -> _InUse:
    return _IN_USE.get() or _default()


@cache
def _default() -> _InUse:
    return _InUse(LayoutConfig(), "layout", "the model")


def _shares(axes: Axes, mesh: Mesh | AbstractMesh | None) -> int:
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def _check_axes(key: str, axes: Axes) -> None:
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"{key} has {axis}, which is not an axis of the mesh, {suggest(axis, AXES)}.")
        if axes.count(axis) > 1:
            raise UserError(f"{key} has {axis} twice; a mesh axis can split a dimension only once.")


def _check_collisions(key: str, dims: str, column: Mapping[str, Axes]) -> None:
    taken: dict[str, str] = {}
    for letter in dims:
        for axis in column.get(letter, ()):
            if axis in taken:
                raise UserError(
                    f"{key} lays both {taken[axis]} and {letter} along mesh axis {axis}, but arrays {dims} have both; "
                    "an axis can split only one dimension of an array."
                )
            taken[axis] = letter


def _spec(dims: str, column: Mapping[str, Axes]) -> PartitionSpec:
    """One entry per dimension: None, a mesh axis, or several of them."""
    entries = (column.get(d, ()) for d in dims)
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries))


def _lay_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
