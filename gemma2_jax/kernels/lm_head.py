"""Losses over the vocabulary, block of tokens by block: [tokens, V] never exists.

The logits of 8,192 tokens at V = 256k are 8.4 GB in float32, and distillation needs the student's, the
teacher's and the gradient's. Here a block of tokens goes through the LM head, the soft cap, the loss and
back, and only its gradients stay: with respect to its hidden states, and summed into the embedding's.
Doing so in the forward pass needs no second pass over the logits in the backward one, as in Liger
(arXiv 2410.10989, section 3.2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.blocks import join_tokens, split_tokens, stays_in_loop, token_blocks, turned_apart
from gemma2_jax.kernels.softcap import mask_padding, softcap
from gemma2_jax.sharding.layout import batch_shares_in_head, constrain, constrain_in_head, is_split

Coefficients = Mapping[str, jax.Array]  # float32 scalars that may change from step to step: no gradient
Sums = tuple[jax.Array, dict[str, jax.Array]]  # of the loss and of each metric


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "embedding"],
    meta_fields=["softcap", "vocab_padding"],
)
@dataclass(frozen=True)
class LMHead:
    """A model's distributions over the vocabulary, not yet computed.

    Attributes:
        hidden: final hidden states [B, T, D].
        embedding: [V, D]; cast to hidden's dtype for the product.
        softcap: logits become softcap * tanh(logits / softcap).
        vocab_padding: the last so many rows of the embedding belong to no token.
    """

    hidden: jax.Array
    embedding: jax.Array
    softcap: float
    vocab_padding: int = 0


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "log_weights", "tail"], meta_fields=[])
@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of a teacher's distribution at each position, and what is left: from a cache. A pytree.

    Attributes:
        ids: int32 [B, T, K], the tokens of one position all different.
        log_weights: float32 [B, T, K], logarithms of their weights; `softcap.NEVER`, or anything else that is finite
            and whose exp is 0, in a place without a token.
        tail: float32 [B, T], the weight of all other tokens together; 0 where the ids are all there are.
    """

    ids: Any
    log_weights: Any
    tail: Any


# (student logits [.., V], teacher, targets [..], coefficients) -> (loss [..], {metric: [..]}), all float32. The
# teacher is its logits [.., V], SparseTargets or None; logits are soft-capped and those of padding masked.
TokenLoss = Callable[
    [jax.Array, jax.Array | SparseTargets | None, jax.Array, Coefficients],
    tuple[jax.Array, dict[str, jax.Array]],
]
Teacher = LMHead | SparseTargets | None


def dense_loss(
    token_loss: TokenLoss,
    student: LMHead,
    teacher: Teacher,
    targets: jax.Array,
    mask: jax.Array,
    coefficients: Coefficients | None = None,
) -> Sums:
    """The reference for `blockwise_loss`, with all logits at once. Arguments and results are the same."""
    signal = jax.lax.stop_gradient(_signal(teacher))
    return _masked_sums(token_loss, _logits(student), signal, targets, mask, coefficients or {})


def blockwise_loss(
    token_loss: TokenLoss,
    student: LMHead,
    teacher: Teacher,
    targets: jax.Array,
    mask: jax.Array,
    block_tokens: int,
    coefficients: Coefficients | None = None,
) -> Sums:
    """Sum of `token_loss` over the tokens of a batch, differentiable in the student's states and embedding.

    Args:
        token_loss: the loss and metrics of each token from its logits.
        student, teacher: where the distributions come from. The teacher gets no gradient.
        targets: int32 [B, T]; mask: float32 [B, T], the weight of each token.
        block_tokens: tokens that each device has logits of at a time.
        coefficients: what `token_loss` takes beside the tokens; none by default.

    Returns:
        The masked sum of the losses, and of each metric. Metrics carry no gradient.
    """
    B, T = targets.shape
    blocks = token_blocks(B, T, block_tokens)
    frozen = jax.lax.stop_gradient(teacher)
    return _blockwise(token_loss, blocks, student, frozen, targets, mask, coefficients or {})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    token_loss: TokenLoss,
    blocks: int,
    student: LMHead,
    teacher: Teacher,
    targets: jax.Array,
    mask: jax.Array,
    coefficients: Coefficients,
) -> Sums:
    embedding = _for_use(student)

    def body(sums: Sums, block: Any) -> tuple[Sums, None]:
        hidden, part, block_targets, block_mask = block
        head = replace(student, hidden=hidden, embedding=embedding)
        signal = _with_tokens(teacher, part)
        return _add(sums, dense_loss(token_loss, head, signal, block_targets, block_mask, coefficients)), None

    split = _split(blocks, student, teacher, targets, mask)
    sums, _ = jax.lax.scan(body, _zero_sums(token_loss, teacher, coefficients), split)
    return sums


@dataclass(frozen=True)
class _Plan:
    """How the blocks are gone through, which differs by platform.

    Attributes:
        sums_as: the embedding's gradient is summed as this. [V, D] is what is asked for, but there the CPU's product
            has d_products, the largest array here, transposed; as [D, V] it takes some 2/3 of the time.
        casts_blockwise: the embedding is cast anew for each block, as part of its product, which the TPU does while
            it reads. All at once, the copy is larger than the logits of two blocks.
    """

    sums_as: str
    casts_blockwise: bool


def _blockwise_forward(
    token_loss: TokenLoss,
    blocks: int,
    student: LMHead,
    teacher: Teacher,
    targets: jax.Array,
    mask: jax.Array,
    coefficients: Coefficients,
) -> tuple[Sums, LMHead]:
    sums, gradients = jax.lax.platform_dependent(
        student,
        teacher,
        targets,
        mask,
        coefficients,
        cpu=partial(_sums_and_gradients, token_loss, blocks, _Plan("DV", False)),
        tpu=partial(_sums_and_gradients, token_loss, blocks, _Plan("VD", True)),
        default=partial(_sums_and_gradients, token_loss, blocks, _Plan("VD", False)),
    )
    return sums, gradients


def _sums_and_gradients(
    token_loss: TokenLoss,
    blocks: int,
    plan: _Plan,
    student: LMHead,
    teacher: Teacher,
    targets: jax.Array,
    mask: jax.Array,
    coefficients: Coefficients,
) -> tuple[Sums, LMHead]:
    dtype = student.hidden.dtype
    # Where the embedding has to be gathered from its parts, less is sent of it cast, and a copy is made anyway.
    casts_blockwise = plan.casts_blockwise and not is_split("D")
    whole = student.embedding if casts_blockwise else _for_use(student)
    # Devices that do not share a vocabulary each sum up a gradient of their own, or they would send theirs with
    # every block.
    R, sums_as = batch_shares_in_head(), f"R{plan.sums_as}"

    def rows_apart(x: jax.Array, dims: str) -> jax.Array:
        return constrain_in_head(x.reshape(R, -1, *x.shape[1:]), f"R_{dims}")

    def body(carry: Any, block: Any) -> tuple[Any, jax.Array]:
        sums, d_embedding = carry
        hidden, part, block_targets, block_mask = block
        embedding = stays_in_loop(whole, block_targets[0, 0]).astype(dtype) if casts_blockwise else whole
        signal = _signal(_with_tokens(teacher, part))

        def masked_loss(products: jax.Array) -> tuple[jax.Array, Sums]:
            logits = _cap(student, products)
            block_sums = _masked_sums(token_loss, logits, signal, block_targets, block_mask, coefficients)
            return block_sums[0], block_sums

        hidden = _in_head(hidden)
        products = _products(hidden, embedding)
        d_products, block_sums = jax.grad(masked_loss, has_aux=True)(products)
        d_products = constrain_in_head(d_products.astype(dtype), "BTV")
        d_hidden = constrain(jnp.einsum("BTV,VD->BTD", d_products, embedding), "BTD")
        d_embedding += jnp.einsum(
            f"RBTD,RBTV->{sums_as}",
            rows_apart(hidden, "TD"),
            rows_apart(d_products, "TV"),
            preferred_element_type=jnp.float32,
        )
        return (_add(sums, block_sums), constrain_in_head(d_embedding, sums_as)), d_hidden

    V, D = student.embedding.shape
    zeros = jnp.zeros((R, V, D) if plan.sums_as == "VD" else (R, D, V), jnp.float32)
    carry = (_zero_sums(token_loss, teacher, coefficients), constrain_in_head(zeros, sums_as))
    split = _split(blocks, student, teacher, targets, mask)
    (sums, d_embedding), d_hidden = jax.lax.scan(body, carry, split)
    d_hidden = join_tokens(d_hidden, targets.shape[1])
    d_embedding = constrain_in_head(jnp.sum(d_embedding, axis=0), plan.sums_as)
    d_embedding = d_embedding if plan.sums_as == "VD" else turned_apart(d_embedding).T
    return sums, replace(student, hidden=d_hidden, embedding=d_embedding.astype(student.embedding.dtype))


def _blockwise_backward(
    token_loss: TokenLoss, blocks: int, d_student: LMHead, cotangents: Sums
) -> tuple[LMHead, None, None, None, None]:
    scale = cotangents[0]
    scaled = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), d_student)
    return scaled, None, None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _masked_sums(
    token_loss: TokenLoss,
    logits: jax.Array,
    signal: jax.Array | SparseTargets | None,
    targets: jax.Array,
    mask: jax.Array,
    coefficients: Coefficients,
) -> Sums:
    loss, metrics = token_loss(logits, signal, targets, coefficients)
    return jnp.sum(loss * mask), {name: jnp.sum(metric * mask) for name, metric in metrics.items()}


def _split(blocks: int, student: LMHead, teacher: Teacher, targets: jax.Array, mask: jax.Array) -> Any:
    """What a loop over blocks goes through.

    All blocks lie as activations do. Left to itself, the compiler would have them lie as the one in use does in the
    LM head, and gather all of them to have that one.
    """

    def split(x: jax.Array) -> jax.Array:
        x = split_tokens(blocks, x)
        return constrain(x, "_BTD"[: x.ndim])

    tokens = student.hidden, _tokens_of(teacher), targets, mask
    return jax.tree.map(split, tokens)


def _tokens_of(teacher: Teacher) -> Any:
    """The part of a teacher that has an entry for each token."""
    return teacher.hidden if isinstance(teacher, LMHead) else teacher


def _with_tokens(teacher: Teacher, part: Any) -> Teacher:
    """The teacher of some tokens only, whose part `_tokens_of` gave."""
    return replace(teacher, hidden=part) if isinstance(teacher, LMHead) else part


def _signal(teacher: Teacher) -> jax.Array | SparseTargets | None:
    """What a token loss takes of it."""
    return _logits(teacher) if isinstance(teacher, LMHead) else teacher


def _for_use(head: LMHead) -> jax.Array:
    return constrain_in_head(head.embedding.astype(head.hidden.dtype), "VD")


def _in_head(hidden: jax.Array) -> jax.Array:
    """A block's hidden states as they lie in the LM head.

    First as they lie outside, where they come from: or the compiler would gather all blocks to have this one.
    """
    return constrain_in_head(constrain(hidden, "BTD"), "BTD")


def _products(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    products = jnp.einsum("BTD,VD->BTV", hidden, embedding, preferred_element_type=jnp.float32)
    return constrain_in_head(products, "BTV")


def _logits(head: LMHead) -> jax.Array:
    return _cap(head, _products(_in_head(head.hidden), _for_use(head)))


def _cap(head: LMHead, products: jax.Array) -> jax.Array:
    return mask_padding(softcap(products, head.softcap), head.vocab_padding)


def _zero_sums(token_loss: TokenLoss, teacher: Teacher, coefficients: Coefficients) -> Sums:
    """The sums before the first block; which metrics there are is read off an abstract token."""
    logits = jax.ShapeDtypeStruct((2,), jnp.float32)
    target = jax.ShapeDtypeStruct((), jnp.int32)
    signal: Any = logits if isinstance(teacher, LMHead) else teacher
    if isinstance(teacher, SparseTargets):
        signal = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), teacher)
    shapes = jax.eval_shape(token_loss, logits, signal, target, coefficients)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)
