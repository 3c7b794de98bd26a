"""The names and layouts of Gemma 2's weights in other tools' formats: one table per format.

Everything else about a format's tensors follows from its table and `model/weights.py`: names, shapes, and how to split
a foreign tensor into our weights or join our weights into a foreign tensor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma2_jax.model.weights import Specs, specs_by_path


@dataclass(frozen=True)
class Tensor:
    """One tensor of a foreign format; one in each layer if the name contains `{layer}`.

    Attributes:
        name: name in the format's files.
        weights: paths of our weights that it holds, relative to the block for those of a layer. Several are stacked
            along a leading axis.
        dims: its axes by letter, with merged axes in brackets: `(NH)D` has shape [N * H, D].
        offset: difference between the stored value and ours.
    """

    name: str
    weights: tuple[str, ...]
    dims: str
    offset: float = 0.0


EMBEDDING = "embedder/embedding"
CONTEXT = 8192  # Gemma 2's context length in tokens (report, table 1), which other formats store

HUGGINGFACE = (
    Tensor("model.embed_tokens.weight", (EMBEDDING,), "VD"),
    Tensor("model.layers.{layer}.input_layernorm.weight", ("pre_attention_norm/scale",), "D"),
    Tensor("model.layers.{layer}.self_attn.q_proj.weight", ("attention/query",), "(NH)D"),
    Tensor("model.layers.{layer}.self_attn.k_proj.weight", ("attention/key",), "(KH)D"),
    Tensor("model.layers.{layer}.self_attn.v_proj.weight", ("attention/value",), "(KH)D"),
    Tensor("model.layers.{layer}.self_attn.o_proj.weight", ("attention/output",), "D(NH)"),
    Tensor("model.layers.{layer}.post_attention_layernorm.weight", ("post_attention_norm/scale",), "D"),
    Tensor("model.layers.{layer}.pre_feedforward_layernorm.weight", ("pre_mlp_norm/scale",), "D"),
    Tensor("model.layers.{layer}.mlp.gate_proj.weight", ("mlp/gate",), "FD"),
    Tensor("model.layers.{layer}.mlp.up_proj.weight", ("mlp/up",), "FD"),
    Tensor("model.layers.{layer}.mlp.down_proj.weight", ("mlp/down",), "DF"),
    Tensor("model.layers.{layer}.post_feedforward_layernorm.weight", ("post_mlp_norm/scale",), "D"),
    Tensor("model.norm.weight", ("final_norm/scale",), "D"),
)


def deepmind(transposed_gating: bool) -> tuple[Tensor, ...]:
    """Returns DeepMind's layout in the shorter of its two spellings (without `transformer/` and `/w`).

    The released 9B and 27B hold gate and up as [F, D], the 2B as [D, F].
    """
    return (
        Tensor("embedder/input_embedding", (EMBEDDING,), "VD"),
        Tensor("layer_{layer}/pre_attention_norm/scale", ("pre_attention_norm/scale",), "D"),
        Tensor("layer_{layer}/attn/q_einsum", ("attention/query",), "NDH"),
        Tensor("layer_{layer}/attn/kv_einsum", ("attention/key", "attention/value"), "KDH"),
        Tensor("layer_{layer}/attn/attn_vec_einsum", ("attention/output",), "NHD"),
        Tensor("layer_{layer}/post_attention_norm/scale", ("post_attention_norm/scale",), "D"),
        Tensor("layer_{layer}/pre_ffw_norm/scale", ("pre_mlp_norm/scale",), "D"),
        Tensor(
            "layer_{layer}/mlp/gating_einsum", ("mlp/gate", "mlp/up"), "FD" if transposed_gating else "DF"
        ),
        Tensor("layer_{layer}/mlp/linear", ("mlp/down",), "FD"),
        Tensor("layer_{layer}/post_ffw_norm/scale", ("post_mlp_norm/scale",), "D"),
        Tensor("final_norm/scale", ("final_norm/scale",), "D"),
    )


# llama.cpp multiplies by a norm's stored scale; ours is applied as (1 + w).
GGUF = (
    Tensor("token_embd.weight", (EMBEDDING,), "VD"),
    Tensor("blk.{layer}.attn_norm.weight", ("pre_attention_norm/scale",), "D", offset=1.0),
    Tensor("blk.{layer}.attn_q.weight", ("attention/query",), "(NH)D"),
    Tensor("blk.{layer}.attn_k.weight", ("attention/key",), "(KH)D"),
    Tensor("blk.{layer}.attn_v.weight", ("attention/value",), "(KH)D"),
    Tensor("blk.{layer}.attn_output.weight", ("attention/output",), "D(NH)"),
    Tensor("blk.{layer}.post_attention_norm.weight", ("post_attention_norm/scale",), "D", offset=1.0),
    Tensor("blk.{layer}.ffn_norm.weight", ("pre_mlp_norm/scale",), "D", offset=1.0),
    Tensor("blk.{layer}.ffn_gate.weight", ("mlp/gate",), "FD"),
    Tensor("blk.{layer}.ffn_up.weight", ("mlp/up",), "FD"),
    Tensor("blk.{layer}.ffn_down.weight", ("mlp/down",), "DF"),
    Tensor("blk.{layer}.post_ffw_norm.weight", ("post_mlp_norm/scale",), "D", offset=1.0),
    Tensor("output_norm.weight", ("final_norm/scale",), "D", offset=1.0),
)


@dataclass(frozen=True)
class WeightPlace:
    """A weight's location in our parameters: its path, and its index along P if it belongs to a layer."""

    path: str
    pair: int | None


@dataclass(frozen=True)
class Entry:
    """One tensor of a foreign checkpoint and the places of our weights that it holds.

    Attributes:
        tensor: its row in the format's table.
        shape: shape of the foreign tensor.
        places: places of our weights in it, in the order in which they are stacked.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    places: tuple[WeightPlace, ...]
    _dims: str  # letters of each of our weights, without P
    _sizes: tuple[int, ...]  # sizes of the letters of the foreign dims, without brackets

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns the foreign tensor as arrays in our layout, one per place; views if it has no offset."""
        letters = re.sub(r"[()]", "", self.tensor.dims)
        parts = list(array) if len(self.places) > 1 else [array]
        axes = [letters.index(d) for d in self._dims]
        split = [part.reshape(self._sizes).transpose(axes) for part in parts]
        return [self._shifted(part, -self.tensor.offset) for part in split]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the foreign tensor made of our weights, in the order of `places`, as a new, contiguous array."""
        letters = re.sub(r"[()]", "", self.tensor.dims)
        axes = [self._dims.index(d) for d in letters]
        moved = [self._shifted(part.transpose(axes), self.tensor.offset) for part in parts]
        stacked = np.stack(moved) if len(moved) > 1 else moved[0]
        return np.ascontiguousarray(stacked).reshape(self.shape)

    @staticmethod
    def _shifted(part: np.ndarray, offset: float) -> np.ndarray:
        # In float32: 1 + w in bfloat16 would lose most of w.
        return (part.astype(np.float32) + np.float32(offset)) if offset else part


def expand(layout: Sequence[Tensor], specs: Specs) -> dict[str, Entry]:
    """Returns every tensor of a checkpoint with these weights, by name, starting with the embedding."""
    weights = specs_by_path(specs)
    sizes = {letter: size for spec in weights.values() for letter, size in spec.sizes.items()}
    found = {}
    for tensor in layout:
        foreign = re.sub(r"[()]", "", tensor.dims)
        merged = re.findall(r"\([A-Z]+\)|[A-Z]", tensor.dims)
        shape = [int(np.prod([sizes[d] for d in axis.strip("()")])) for axis in merged]
        if len(tensor.weights) > 1:
            shape.insert(0, len(tensor.weights))
        layers: Sequence[int | None] = range(2 * sizes["P"]) if "{layer}" in tensor.name else [None]
        for layer in layers:
            places = tuple(place_of(path, layer) for path in tensor.weights)
            found[tensor.name.format(layer=layer)] = Entry(
                tensor,
                tuple(shape),
                places,
                _dims=weights[places[0].path].dims.removeprefix("P"),
                _sizes=tuple(sizes[d] for d in foreign),
            )
    return found


def place_of(path: str, layer: int | None) -> WeightPlace:
    """The place of a weight of a layer, whose path is relative to the block, or of the whole model (None)."""
    if layer is None:
        return WeightPlace(path, None)
    return WeightPlace(f"pairs/{'global_block' if layer % 2 else 'local_block'}/{path}", layer // 2)
