"""Initialises a student from a part of its teacher: some of its layers, channels, neurons and heads.

The selection is the same in every weight: one set of channels D for the whole model, since all layers share the
residual stream; a set of neurons F and a set of heads for each layer.

A narrower RMSNorm averages over fewer channels, and the embedding is multiplied by the square root of a smaller D. The
student should compute what the teacher would if everything removed were zero. For this, the student's residual stream
is r = sqrt(D of the student / D of the teacher) times the teacher's, so that the input of every norm has the same mean
square as in the teacher:
- the embedding is unchanged, since it is multiplied by a sqrt(D) that is already r times the teacher's;
- `output` of the attention and `down` of the MLP are multiplied by r;
- the scales of the norms on the residual stream are divided by r; after the final norm, the logits are the teacher's.

The width H of a head is not reduced. RoPE rotates the pair (i, i + H/2) by base^(-2i/H) per position. In a narrower
head, nearly all pairs would rotate at other speeds than those they were trained with, whichever pairs are kept.
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
from gemma2_jax.messages import written
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, Weight, abstract_params, dim_sizes, map_specs, weight_specs
from gemma2_jax.sharding.layout import check_activations, key_in_use, laid_out, layout_in_use

BLOCKS = ("local_block", "global_block")

# Settings that must be equal in teacher and student: with another value, the same weights compute something else.
_CONSTANTS = (
    "vocab_size", "vocab_padding", "head_dim", "sliding_window", "global_every", "query_pre_attn_scalar",
    "attn_logit_softcap", "final_logit_softcap", "rope_base", "norm_eps",
)  # fmt: skip
_WIDTHS = ("d_model", "d_ff", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class InitConfig:
    """The initial weights of a new run. A run that is resumed uses its own newest checkpoint instead.

    Attributes:
        source: a checkpoint in any format that `gemma2 convert` accepts; null for random weights.
        layers: which (local, global) pairs of the source's layers a student with fewer layers keeps: `first`;
            `even`, evenly spaced from the first to the last; or a list of pair numbers from 0. Null if the student has
            as many layers as the source.
        width: which channels, neurons and heads a narrower student keeps: `first`; or `importance`, those with the
            largest contribution in the source on the training data. Null if the student is as
            wide as the source.
        batches: number of training batches to measure the importance on.
    """

    source: str | None = None
    layers: Literal["first", "even"] | tuple[int, ...] | None = None
    width: Literal["first", "importance"] | None = None
    batches: int = 8

    def __post_init__(self) -> None:
        for name in ("layers", "width"):
            if self.source is None and getattr(self, name) is not None:
                raise UserError(
                    f"initialise.{name} is {written(getattr(self, name))}, but initialise.source is null, so there is "
                    f"nothing to choose from; set initialise.source to a checkpoint, or initialise.{name} to null."
                )
        if isinstance(self.layers, tuple) and list(self.layers) != sorted(
            {abs(pair) for pair in self.layers}
        ):
            raise UserError(
                f"initialise.layers is {written(self.layers)}; it must be a list of different pair numbers, counted "
                "from 0, in ascending order."
            )
        if self.batches < 1:
            raise UserError(f"initialise.batches is {self.batches}; it must be at least 1.")


@partial(jax.tree_util.register_dataclass, data_fields=["pairs", "channels", "blocks"], meta_fields=[])
@dataclass(frozen=True)
class KeptIndices:
    """The parts of the teacher that become the student: int32 indices into the teacher, in ascending order.

    Attributes:
        pairs: pairs of layers, [P of the student].
        channels: channels, [D of the student].
        blocks: for `local_block` and `global_block`, indices by letter: F neurons [P, F], N query heads [P, N] and
            K key/value heads [P, K].
    """

    pairs: Any
    channels: Any
    blocks: dict[str, dict[str, Any]]


def initial_params(
    config: InitConfig,
    student: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    batches: Iterable[Batch],
    dtype: Any = "float32",
) -> Params:
    """Loads the student's parameters from `config.source` onto the mesh, cut to the student's sizes.

    A source with the student's sizes is loaded as it is. Otherwise the mesh temporarily holds the whole source in
    addition to the student.

    Args:
        dtype: dtype of the parameters, or a nested dict of dtypes, laid out like `weight_specs(student)`.
        batches: batches on the mesh; the first `config.batches` are used if width is `importance`.

    Raises:
        UserError: the source is incomplete, has another tokenizer, or the student is not a part of it.
    """
    if config.source is None:
        raise UserError("initialise.source is null; it must be a checkpoint.")
    source = open_for(tokenizer, config.source, "initialise.source")
    # load_params raises if the number of tokens differs; only the padding rows may differ.
    teacher = replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)
    _check(config, teacher, student)
    target = abstract_params(weight_specs(student), mesh=mesh)
    importance = None
    with laid_out(layout_in_use(), key_in_use(), f"initialise.source {config.source}"):
        params = load_params(source, teacher, dtype, mesh)
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
    """Selects the parts of the teacher to keep.

    Query heads stay in the group of their key/value head: some groups are kept, with the same number of heads in each.

    Args:
        importance: importance measured on the teacher; None selects the first of everything.

    Raises:
        UserError: the student is not a part of the teacher.
    """
    _check(config, teacher, student)
    pairs = _choose_pairs(config.layers, teacher.num_pairs, student.num_pairs)
    if importance is None:
        importance = _first(teacher)
    # Only the kept layers count: a channel that only removed layers use does not help the student.
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
    """Cuts the student's parameters out of the teacher's, both trees as in `weight_specs`; can be jitted.

    If the widths are equal, the selected weights are bit-identical to the teacher's.
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
    """Takes the kept indices along each axis whose letter has some."""
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
    """The selected neurons and heads of one kind of block, by letter, for all pairs at once."""
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
    """Indices of the `count` largest values along the last axis, in ascending order; the first of equal values."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int32)


def _first(teacher: ModelConfig) -> Importance:
    """Equal importance for everything, so that the first ones are selected."""
    P = teacher.num_pairs
    sizes = (teacher.d_model, teacher.d_ff, teacher.num_heads)
    block = BlockImportance(*(np.zeros((P, size), np.float32) for size in sizes))
    return Importance(dict.fromkeys(BLOCKS, block), np.zeros(teacher.d_model, np.float32))


def _check(config: InitConfig, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises UserError unless the student is a part of the teacher, and the config selects which part."""
    where = f"initialise.source {config.source}"
    for name in _CONSTANTS:
        available, needed = getattr(teacher, name), getattr(student, name)
        if available != needed:
            why = ", since RoPE's frequencies depend on it" if name == "head_dim" else ""
            raise UserError(
                f"{where} has {name} {available}, but model.{name} is {needed}; both must be the same{why}."
            )
    for name in ("num_layers", *_WIDTHS):
        available, needed = getattr(teacher, name), getattr(student, name)
        if available < needed:
            raise UserError(
                f"{where} has {name} {available}, but model.{name} is {needed}; choose a source that has at least "
                f"{needed}, or a smaller model.{name}."
            )
    available = teacher.num_heads // teacher.num_kv_heads
    needed = student.num_heads // student.num_kv_heads
    if available < needed:
        raise UserError(
            f"{where} has {available} query heads for each key/value head ({teacher.num_heads} for "
            f"{teacher.num_kv_heads}), but the model has {needed} ({student.num_heads} for {student.num_kv_heads}); "
            f"choose model.num_heads and model.num_kv_heads with at most {available}."
        )
    _check_selection(config, teacher, student)


def _check_selection(config: InitConfig, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises UserError if the config does not select what to keep of everything that has to be cut."""
    where = f"initialise.source {config.source}"
    if config.layers is None and teacher.num_layers != student.num_layers:
        raise UserError(
            f"{where} has num_layers {teacher.num_layers}, but model.num_layers is {student.num_layers}; set "
            "initialise.layers to those to keep: first, even or a list of pairs."
        )
    for name in _WIDTHS:
        available, needed = getattr(teacher, name), getattr(student, name)
        if config.width is None and available != needed:
            raise UserError(
                f"{where} has {name} {available}, but model.{name} is {needed}; set initialise.width to what to keep: "
                "first or importance."
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
