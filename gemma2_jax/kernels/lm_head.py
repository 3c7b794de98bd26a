"""Losses over the vocabulary, block of tokens by block: [tokens, V] never exists.

The logits of 8,192 tokens at V = 256k are 8.4 GB in float32, and distillation needs the student's, the
teacher's and the gradient's. Here a block of tokens goes through the LM head, the soft cap, the loss and
back, and only its gradients stay: with respect to its hidden states, and summed into the embedding's.
Doing so in the forward pass needs no second pass over the logits in the backward one, as in Liger
(arXiv 2410.10989, section 3.2).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import mask_padding, softcap
from gemma2_jax.sharding.layout import batch_shares, constrain

# (student logits [.., V], teacher logits [.., V] or None, targets [..]) -> (loss [..], {metric: [..]}),
# all float32, logits soft-capped and those of padding masked.
TokenLoss = Callable[[jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


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


def dense_loss(
    token_loss: TokenLoss, student: LMHead, teacher: LMHead | None, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The reference for `blockwise_loss`, with all logits at once. Arguments and results are the same."""
    teacher_logits = None if teacher is None else jax.lax.stop_gradient(_logits(teacher))
    loss, metrics = token_loss(_logits(student), teacher_logits, targets)
    return jnp.sum(loss * mask), {name: jnp.sum(metric * mask) for name, metric in metrics.items()}


def blockwise_loss(
    token_loss: TokenLoss,
    student: LMHead,
    teacher: LMHead | None,
    targets: jax.Array,
    mask: jax.Array,
    block_tokens: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of `token_loss` over the tokens of a batch, differentiable in the student's states and embedding.

    Args:
        token_loss: the loss and metrics of each token from its logits.
        student, teacher: where the logits come from. The teacher gets no gradient.
        targets: int32 [B, T]; mask: float32 [B, T], the weight of each token.
        block_tokens: tokens that each device has logits of at a time.

    Returns:
        The masked sum of the losses, and of each metric. Metrics carry no gradient.
    """
    B, T = targets.shape
    blocks = -(-T // max(1, block_tokens * batch_shares() // B))
    frozen = jax.lax.stop_gradient(teacher)
    return _blockwise(token_loss, blocks, student, frozen, targets, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    token_loss: TokenLoss,
    blocks: int,
    student: LMHead,
    teacher: LMHead | None,
    targets: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    embedding = _for_use(student)

    def body(sums: Any, block: Any) -> tuple[Any, None]:
        hidden, teacher_hidden, block_targets, block_mask = block
        head = replace(student, hidden=hidden, embedding=embedding)
        block_teacher = _replace_hidden(teacher, teacher_hidden)
        return _add(sums, dense_loss(token_loss, head, block_teacher, block_targets, block_mask)), None

    sums, _ = jax.lax.scan(
        body, _zero_sums(token_loss, teacher), _split(blocks, student, teacher, targets, mask)
    )
    return sums


def _blockwise_forward(
    token_loss: TokenLoss,
    blocks: int,
    student: LMHead,
    teacher: LMHead | None,
    targets: jax.Array,
    mask: jax.Array,
) -> tuple[Any, Any]:
    embedding = _for_use(student)
    dtype = student.hidden.dtype

    def body(carry: Any, block: Any) -> tuple[Any, jax.Array]:
        sums, d_embedding = carry
        hidden, teacher_hidden, block_targets, block_mask = block
        block_teacher = _replace_hidden(teacher, teacher_hidden)
        teacher_logits = None if block_teacher is None else _logits(block_teacher)

        def masked_loss(products: jax.Array) -> tuple[jax.Array, Any]:
            loss, metrics = token_loss(_cap(student, products), teacher_logits, block_targets)
            total = jnp.sum(loss * block_mask)
            return total, (total, {name: jnp.sum(metric * block_mask) for name, metric in metrics.items()})

        products = _products(hidden, embedding)
        d_products, block_sums = jax.grad(masked_loss, has_aux=True)(products)
        d_products = constrain(d_products.astype(dtype), "BTV")
        d_hidden = constrain(jnp.einsum("BTV,VD->BTD", d_products, embedding), "BTD")
        # [D, V]: to sum it as [V, D] would have d_products, the largest array here, transposed on CPU.
        d_embedding += jnp.einsum("BTD,BTV->DV", hidden, d_products, preferred_element_type=jnp.float32)
        return (_add(sums, block_sums), constrain(d_embedding, "DV")), d_hidden

    zeros = constrain(jnp.zeros(student.embedding.shape[::-1], jnp.float32), "DV")
    carry = (_zero_sums(token_loss, teacher), zeros)
    (sums, d_embedding), d_hidden = jax.lax.scan(body, carry, _split(blocks, student, teacher, targets, mask))
    T = targets.shape[1]
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(targets.shape[0], -1, student.hidden.shape[-1])[:, :T]
    d_embedding = d_embedding.T.astype(student.embedding.dtype)
    return sums, (replace(student, hidden=d_hidden, embedding=d_embedding), teacher)


def _blockwise_backward(
    token_loss: TokenLoss, blocks: int, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    d_student, teacher = residuals
    scale = cotangents[0]
    d_student = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), d_student)
    return d_student, jax.tree.map(jnp.zeros_like, teacher), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _split(
    blocks: int, student: LMHead, teacher: LMHead | None, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """[B, T, ...] to [blocks, B, T / blocks, ...], padded with tokens of weight 0."""

    def split(x: jax.Array) -> jax.Array:
        B, T, *rest = x.shape
        per_block = -(-T // blocks)
        padded = jnp.pad(x, [(0, 0), (0, blocks * per_block - T)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(padded.reshape(B, blocks, per_block, *rest), 1, 0)

    teacher_hidden = None if teacher is None else split(teacher.hidden)
    return split(student.hidden), teacher_hidden, split(targets), split(mask)


def _replace_hidden(teacher: LMHead | None, hidden: jax.Array | None) -> LMHead | None:
    return None if teacher is None or hidden is None else replace(teacher, hidden=hidden)


def _for_use(head: LMHead) -> jax.Array:
    return constrain(head.embedding.astype(head.hidden.dtype), "VD")


def _products(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    products = jnp.einsum("BTD,VD->BTV", hidden, embedding, preferred_element_type=jnp.float32)
    return constrain(products, "BTV")


def _logits(head: LMHead) -> jax.Array:
    return _cap(head, _products(head.hidden, _for_use(head)))


def _cap(head: LMHead, products: jax.Array) -> jax.Array:
    return mask_padding(softcap(products, head.softcap), head.vocab_padding)


def _zero_sums(token_loss: TokenLoss, teacher: LMHead | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sums before the first block; which metrics there are is read off an abstract token."""
    logits = jax.ShapeDtypeStruct((2,), jnp.float32)
    target = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = jax.eval_shape(token_loss, logits, None if teacher is None else logits, target)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)
