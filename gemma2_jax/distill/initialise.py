"""A student that begins as a part of its teacher: some of its layers, channels, neurons and heads.

What is kept is cut out of every weight consistently: one choice of channels D for the whole model, since all
layers share the residual stream; a choice of neurons F and of heads for each layer.

A narrower RMSNorm averages over fewer channels, and the embedding is multiplied by the root of a smaller D. So
that the student computes what its teacher would if all that is removed were zero, its residual stream is
r = sqrt(D of the student / D of the teacher) times the teacher's, and every norm then sees the mean square that
it saw in the teacher:
- the embedding is kept as it is: on entry it is multiplied by a sqrt(D) that is r times the teacher's;
- `output` of the attention and `down` of the MLP are multiplied by r;
- the norms that read the stream give 1 / r of their scale; behind the final one, the logits are the teacher's.

The width of a head is not cut. RoPE turns the pair (i, i + H/2) by base^(-2i/H) a position: fewer pairs of a
trained head would be turned at other speeds than they were trained with, but for one in every so many of them,
whatever they do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.importance import BlockImportance, Importance, measure
from gemma2_jax.formats.load import load_params, open_for
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, Weight, abstract_params, dim_sizes, map_specs, weight_specs
from gemma2_jax.sharding.layout import check_activations, key_in_use, laid_out, layout_in_use

BLOCKS = ("local_block", "global_block")

# What cannot be cut: with another value of one of these, the same weights compute something else.
_CONSTANTS = (
    "vocab_size", "vocab_padding", "head_dim", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcap",
    "final_logit_softcap", "rope_base", "norm_eps",
)  # fmt: skip
_WIDTHS = ("d_model", "d_ff", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class InitConfig:
    """The weights that a new run begins with. A run that goes on does so from its own newest checkpoint.

    Attributes:
        source: a checkpoint of any kind that `gemma2 convert` reads; null for random weights.
        layers: which (local, global) pairs of the source's layers a student with fewer of them keeps: `first`;
            `even`, evenly spaced from the first to the last; or their numbers from 0. Null if it has as many.
        width: which channels, neurons and heads a narrower student keeps: `first`, or by `importance`, those
            that do most in the source on the data (see `importance.py`). Null if it is as wide.
        batches: of the training data, to measure the importance on.
    """

    source: str | None = None
    layers: Literal["first", "even"] | tuple[int, ...] | None = None
    width: Literal["first", "importance"] | None = None
    batches: int = 8

    def __post_init__(self) -> None:
        for name in ("layers", "width"):
            if self.source is None and getattr(self, name) is not None:
                raise UserError(
                    f"initialise.{name} is {_shown(getattr(self, name))}, but initialise.source is null, so there is "
                    "nothing to choose from."
                )
        if isinstance(self.layers, tuple) and list(self.layers) != sorted(
            {abs(pair) for pair in self.layers}
        ):
            raise UserError(
                f"initialise.layers is {_shown(self.layers)}; it must be pairs of layers, counted from 0, each once "
                "and in rising order."
            )
        if self.batches < 1:
            raise UserError(f"initialise.batches is {self.batches}; it must be at least 1.")


@partial(jax.tree_util.register_dataclass, data_fields=["pairs", "channels", "blocks"], meta_fields=[])
@dataclass(frozen=True)
class KeptIndices:
    """What of the teacher becomes the student; all int32, in the teacher's numbers and rising order.

    Attributes:
        pairs: [P of the student].
        channels: [D of the student].
        blocks: for `local_block` and `global_block`, by letter: F neurons [P, F], N query heads [P, N] and
            K key/value heads [P, K].
    """

    pairs: Any
    channels: Any
    blocks: dict[str, dict[str, Any]]


def initial_params(
    config: InitConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh, batches: Iterable[Batch]
) -> Params:
    """The student's float32 parameters, cut out of `config.source` and laid out on the mesh.

    A model of the student's own sizes is loaded as it is. Else the whole source is on the mesh for a while, in
    float32, beside the student.

    Args:
        batches: laid out on the mesh; the first `config.batches` are read if width is chosen by importance.

    Raises:
        UserError: the source is not whole, has another tokenizer, or the student is no part of it.
    """
    if config.source is None:
        raise UserError("initialise.source is null; it must be a checkpoint.")
    source = open_for(tokenizer, config.source, "initialise.source")
    # A vocabulary of other tokens is refused by load_params: rows of padding alone may differ.
    teacher = replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)
    _check(config, teacher, student)
    target = abstract_params(weight_specs(student), mesh=mesh)
    importance = None
    with laid_out(layout_in_use(), key_in_use(), f"initialise.source {config.source}"):
        params = load_params(source, teacher, "float32", mesh)
        if teacher == student:
            return params
        if config.width == "importance":
            check_activations(mesh, dim_sizes(teacher))
            importance = measure(Gemma2(teacher, params), islice(batches, config.batches), mesh)
    cut = jax.jit(
        partial(select, teacher=teacher, student=student),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target),
    )
    selected: Params = cut(params, choice=choose(config, teacher, student, importance))
    return selected


def choose(
    config: InitConfig, teacher: ModelConfig, student: ModelConfig, importance: Importance | None = None
) -> KeptIndices:
    """What stays. Query heads stay with their key/value head: whole groups first, then the same number in each.

    Args:
        importance: of the teacher; None takes the first of everything.

    Raises:
        UserError: the student is no part of the teacher.
    """
    _check(config, teacher, student)
    pairs = _choose_pairs(config.layers, teacher.num_pairs, student.num_pairs)
    if importance is None:
        importance = _first(teacher)
    # Only what is kept counts: a channel that nothing but the lost layers read is of no use to the student.
    blocks = {
        name: jax.tree.map(lambda each_pair: each_pair[pairs], importance.blocks[name]) for name in BLOCKS
    }
    channels = importance.final + sum(blocks[name].channels.sum(axis=0) for name in BLOCKS)
    return KeptIndices(
        pairs,
        _largest(channels, student.d_model),
        {name: _choose_in_block(blocks[name], teacher, student) for name in BLOCKS},
    )


def select(params: Params, teacher: ModelConfig, student: ModelConfig, choice: KeptIndices) -> Params:
    """The student's parameters out of the teacher's, both laid out like `weight_specs`; can be jitted.

    Where the two are equal in width and everything is kept, so is every bit.
    """
    ratio = (student.d_model / teacher.d_model) ** 0.5

    def cut(path: str, spec: Weight, array: Any) -> jax.Array:
        if spec.dims.startswith("P"):
            block = choice.blocks[path.split("/")[1]]
            array = jnp.take(array, choice.pairs, axis=0)
            array = jax.vmap(partial(_take, spec.dims[1:], choice.channels))(array, block)
        else:
            array = _take(spec.dims, choice.channels, array, {})
        if teacher.d_model == student.d_model:
            return array
        *_, part, name = path.split("/")
        if name in ("output", "down"):
            return array * ratio
        if part in ("pre_attention_norm", "pre_mlp_norm", "final_norm"):
            return (1.0 + array) / ratio - 1.0  # stored as w, applied as 1 + w
        return array

    selected: Params = map_specs(cut, weight_specs(teacher), params)
    return selected


def _take(dims: str, channels: Any, array: jax.Array, kept: Mapping[str, Any]) -> jax.Array:
    """What is kept along each axis whose letter is cut."""
    for axis, letter in enumerate(dims):
        index = channels if letter == "D" else kept.get(letter)
        if index is not None:
            array = jnp.take(array, index, axis=axis)
    return array


def _choose_pairs(layers: str | tuple[int, ...] | None, teacher: int, student: int) -> np.ndarray:
    if isinstance(layers, tuple):
        return np.array(layers, np.int32)
    if layers == "even":
        return np.linspace(0, teacher - 1, student).round().astype(np.int32)
    return np.arange(student, dtype=np.int32)


def _choose_in_block(
    importance: BlockImportance, teacher: ModelConfig, student: ModelConfig
) -> dict[str, np.ndarray]:
    """By letter, for all pairs at once."""
    K, G = teacher.num_kv_heads, teacher.num_heads // teacher.num_kv_heads
    in_groups = importance.heads.reshape(-1, K, G)
    best = _largest(in_groups, student.num_heads // student.num_kv_heads)  # [P, K, G of the student]
    groups = _largest(np.take_along_axis(in_groups, best, axis=-1).sum(axis=-1), student.num_kv_heads)
    heads = np.take_along_axis(best + G * np.arange(K, dtype=np.int32)[:, None], groups[..., None], axis=1)
    return {
        "F": _largest(importance.neurons, student.d_ff),
        "K": groups,
        "N": heads.reshape(len(heads), student.num_heads),
    }


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest are along the last axis, in rising order; the first ones among equals."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int32)


def _first(teacher: ModelConfig) -> Importance:
    """Equal importance of everything, so that the first stay."""
    P = teacher.num_pairs
    sizes = (teacher.d_model, teacher.d_ff, teacher.num_heads)
    block = BlockImportance(*(np.zeros((P, size), np.float32) for size in sizes))
    return Importance(dict.fromkeys(BLOCKS, block), np.zeros(teacher.d_model, np.float32))


def _check(config: InitConfig, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises UserError unless the student is a part of the teacher, and the config says which."""
    where = f"initialise.source {config.source}"
    for name in _CONSTANTS:
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            why = ", since RoPE's frequencies depend on it" if name == "head_dim" else ""
            raise UserError(
                f"{where} has {name} {theirs}, and model.{name} is {ours}; both must be the same{why}."
            )
    for name in ("num_layers", *_WIDTHS):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs < ours:
            raise UserError(
                f"{where} has {name} {theirs}, and model.{name} is {ours}; initialise.source must be a model "
                "that has at least as many."
            )
    theirs = teacher.num_heads // teacher.num_kv_heads
    ours = student.num_heads // student.num_kv_heads
    if theirs < ours:
        raise UserError(
            f"{where} has {theirs} query heads for each key/value head ({teacher.num_heads} for "
            f"{teacher.num_kv_heads}), and the model {ours} ({student.num_heads} for {student.num_kv_heads}); choose "
            f"model.num_heads and model.num_kv_heads with at most {theirs}."
        )
    _check_asked(config, teacher, student)


def _check_asked(config: InitConfig, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises UserError if the config does not say how to cut what has to be cut."""
    where = f"initialise.source {config.source}"
    if config.layers is None and teacher.num_layers != student.num_layers:
        raise UserError(
            f"{where} has num_layers {teacher.num_layers}, and model.num_layers is {student.num_layers}; choose "
            "with initialise.layers which to keep: first, even or a list of pairs."
        )
    for name in _WIDTHS:
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if config.width is None and theirs != ours:
            raise UserError(
                f"{where} has {name} {theirs}, and model.{name} is {ours}; choose with initialise.width what to "
                "keep: first or importance."
            )
    if not isinstance(config.layers, tuple):
        return
    if len(config.layers) != student.num_pairs:
        raise UserError(
            f"initialise.layers names {len(config.layers)} pairs of layers, but model.num_layers={student.num_layers} "
            f"needs {student.num_pairs} pairs."
        )
    if max(config.layers) >= teacher.num_pairs:
        raise UserError(
            f"initialise.layers names pair {max(config.layers)}, but {where} has pairs 0 to {teacher.num_pairs - 1}."
        )


def _shown(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else str(list(value))
