"""Losses over the vocabulary, one block of tokens at a time, so that [tokens, V] never exists.

The logits of 8,192 tokens at V = 256k are 8.4 GB in float32, and a loss may need the logits of several models and the
gradients of some. Here a block of tokens goes through the LM heads, the soft caps, the loss and its backward pass, and
only gradients remain: those of the block's hidden states, and sums of those of the embeddings. They are computed in the
forward pass, so the backward pass does not go over the logits again, as in Liger (arXiv 2410.10989, section 3.2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.blocks import join_tokens, split_tokens, token_blocks
from gemma2_jax.kernels.softcap import mask_padding, negative_log_prob, softcap
from gemma2_jax.kernels.tuning import HeadPlan, by_head_plan, stays_in_loop
from gemma2_jax.sharding.layout import batch_shares_in_head, constrain, constrain_in_head, is_split

# By head name: float32 [..., V], soft-capped, with padding masked.
Logits = dict[str, jax.Array]
Sums = tuple[jax.Array, Any]  # sum of the loss, and of each metric

# (logits [..., V] by head, per_token [..., ...], coefficients) -> (loss [...], a pytree of metrics [...]), float32.
TokenLoss = Callable[[Logits, Any, Any], tuple[jax.Array, Any]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "embedding"],
    meta_fields=["softcap", "vocab_padding", "trained", "embedding_trained"],
)
@dataclass(frozen=True)
class LMHead:
    """A model's distributions over the vocabulary, not yet computed. A pytree.

    Attributes:
        hidden: final hidden states [B, T, D].
        embedding: [V, D]; cast to hidden's dtype for the product.
        softcap: logits become softcap * tanh(logits / softcap).
        vocab_padding: number of rows at the end of the embedding that belong to no token.
        trained: whether hidden and embedding get gradients; otherwise these are zero and cost nothing.
        embedding_trained: False if only hidden gets gradients.
    """

    hidden: Any
    embedding: Any
    softcap: float
    vocab_padding: int = 0
    trained: bool = True
    embedding_trained: bool = True


Heads = dict[str, LMHead]


def head_logits(hidden: jax.Array, embedding: jax.Array, cap: float, vocab_padding: int) -> jax.Array:
    """Soft-capped float32 logits [..., V] of hidden states [..., D]; -1e30 for padding.

    Args:
        embedding: [V, D], in hidden's dtype and with the layout of its use.
    """
    return capped_logits(_products(hidden, embedding), cap, vocab_padding)


def capped_logits(products: jax.Array, cap: float, vocab_padding: int) -> jax.Array:
    """Soft-capped logits [..., V] of the products of hidden states and embedding; -1e30 for padding."""
    return mask_padding(softcap(products, cap), vocab_padding)


def dense_sums(
    token_loss: TokenLoss,
    heads: Mapping[str, LMHead],
    per_token: Any,
    mask: jax.Array,
    coefficients: Any = None,
) -> Sums:
    """The reference for `lm_head_sums`: computes all logits at once. Arguments and results are the same."""
    trained, frozen = _parts(heads)
    trained = {
        name: head if head.embedding_trained else _with_fixed_embedding(head)
        for name, head in trained.items()
    }
    logits = _logits(trained) | jax.lax.stop_gradient(_logits(frozen))
    constants = jax.lax.stop_gradient((per_token, mask, coefficients))
    return _masked_sums(token_loss, logits, *constants)


def lm_head_sums(
    token_loss: TokenLoss,
    heads: Mapping[str, LMHead],
    per_token: Any,
    mask: jax.Array,
    block_tokens: int,
    coefficients: Any = None,
) -> Sums:
    """Sum of `token_loss` over a batch's tokens, differentiable in hidden states and embeddings of the trained heads.

    Each head's logits of a block are computed once, whatever uses them.

    Args:
        token_loss: gives the loss and metrics of tokens from the logits of all heads.
        heads: heads by name, all with the same B and T.
        per_token: any pytree of arrays [B, T, ...]; `token_loss` gets the entries of its tokens. No gradient.
        mask: float32 [B, T], the weight of each token in the sums. No gradient.
        block_tokens: number of tokens per device whose logits exist at a time.
        coefficients: any pytree of float32 scalars, which may change from step to step. No gradient.

    Returns:
        The masked sum of the losses, and of each metric. Metrics carry no gradient.
    """
    trained, frozen = _parts(heads)
    constants = jax.lax.stop_gradient((frozen, per_token, mask, coefficients))
    B, T = mask.shape
    return _blockwise(token_loss, token_blocks(B, T, block_tokens), trained, *constants)


def token_log_probs(head: LMHead, targets: jax.Array, block_tokens: int) -> jax.Array:
    """log P(target) of each token, float32 [B, T], differentiable in the head for any cotangent [B, T].

    Logits are computed block by block, and again in the backward pass.

    Args:
        targets: int32 [B, T].
        block_tokens: number of tokens per device whose logits exist at a time.
    """
    B, T = targets.shape
    head = head if head.trained else jax.lax.stop_gradient(head)
    return _log_probs(token_blocks(B, T, block_tokens), head, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    token_loss: TokenLoss,
    blocks: int,
    trained: Heads,
    frozen: Heads,
    per_token: Any,
    mask: jax.Array,
    coefficients: Any,
) -> Sums:
    heads = trained | frozen
    embeddings = _for_use(heads)

    def body(sums: Sums, block: Any) -> tuple[Sums, None]:
        hidden, (block_per_token, block_mask) = block
        logits = _logits(heads, hidden, embeddings)
        return _add(sums, _masked_sums(token_loss, logits, block_per_token, block_mask, coefficients)), None

    zeros = _zero_sums(token_loss, heads, per_token, coefficients)
    sums, _ = jax.lax.scan(body, zeros, _split(blocks, _hidden(heads), (per_token, mask)))
    return sums


def _blockwise_forward(token_loss: TokenLoss, blocks: int, *arguments: Any) -> tuple[Sums, Heads]:
    result: tuple[Sums, Heads] = by_head_plan(partial(_sums_and_gradients, token_loss, blocks), *arguments)
    return result


def _blockwise_backward(
    token_loss: TokenLoss, blocks: int, gradients: Heads, cotangents: Sums
) -> tuple[Heads, None, None, None, None]:
    scale = cotangents[0]
    scaled = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)
    return scaled, None, None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _sums_and_gradients(
    token_loss: TokenLoss,
    blocks: int,
    plan: HeadPlan,
    trained: Heads,
    frozen: Heads,
    per_token: Any,
    mask: jax.Array,
    coefficients: Any,
) -> tuple[Sums, Heads]:
    """The sums, and their gradients with respect to the trained heads, in the form of heads."""
    # If an embedding must be gathered from its parts, casting it first sends less, and a copy is made anyway.
    casts_blockwise = plan.casts_blockwise and not is_split("D")
    whole = {name: head.embedding for name, head in trained.items()} if casts_blockwise else _for_use(trained)
    frozen_embeddings = _for_use(frozen)
    # Devices that do not share a vocabulary each sum a gradient of their own. Otherwise they would exchange gradients
    # with every block.
    R, sum_dims = batch_shares_in_head(), f"R{plan.sum_dims}"

    def body(carry: Any, block: Any) -> tuple[Any, Any]:
        sums, d_embeddings = carry
        hidden, (block_per_token, block_mask) = block
        embeddings = whole
        if casts_blockwise:
            embeddings = {
                name: stays_in_loop(table, block_mask[0, 0]).astype(trained[name].hidden.dtype)
                for name, table in whole.items()
            }
        frozen_logits = _logits(frozen, hidden, frozen_embeddings)

        def masked_loss(products: Logits) -> tuple[jax.Array, Sums]:
            logits = _caps(trained, products) | frozen_logits
            block_sums = _masked_sums(token_loss, logits, block_per_token, block_mask, coefficients)
            return block_sums[0], block_sums

        inside = {name: _in_head(hidden[name]) for name in trained}
        products = {name: _products_in_head(inside[name], embeddings[name]) for name in trained}
        d_products, block_sums = jax.grad(masked_loss, has_aux=True)(products)
        d_hidden = {}
        for name, states in inside.items():
            d_product = constrain_in_head(d_products[name].astype(states.dtype), "BTV")
            d_hidden[name] = constrain(jnp.einsum("BTV,VD->BTD", d_product, embeddings[name]), "BTD")
            if name not in d_embeddings:
                continue
            more = jnp.einsum(
                f"RBTD,RBTV->{sum_dims}",
                _rows_apart(R, states, "TD"),
                _rows_apart(R, d_product, "TV"),
                preferred_element_type=jnp.float32,
            )
            d_embeddings = {**d_embeddings, name: constrain_in_head(d_embeddings[name] + more, sum_dims)}
        return (_add(sums, block_sums), d_embeddings), d_hidden

    def zeros(head: LMHead) -> jax.Array:
        sizes = {"R": R, **dict(zip("VD", head.embedding.shape, strict=True))}
        return constrain_in_head(jnp.zeros([sizes[letter] for letter in sum_dims], jnp.float32), sum_dims)

    def gradient(head: LMHead, d_hidden: jax.Array, d_embedding: jax.Array | None) -> LMHead:
        joined = join_tokens(d_hidden, mask.shape[1])
        if d_embedding is None:  # stands for zeros
            return replace(head, hidden=joined, embedding=None)
        summed = plan.as_embedding(constrain_in_head(jnp.sum(d_embedding, axis=0), plan.sum_dims))
        return replace(head, hidden=joined, embedding=summed.astype(head.embedding.dtype))

    heads = trained | frozen
    first = _zero_sums(token_loss, heads, per_token, coefficients)
    carry = (first, {name: zeros(head) for name, head in trained.items() if head.embedding_trained})
    split = _split(blocks, _hidden(heads), (per_token, mask))
    (sums, d_embeddings), d_hidden = jax.lax.scan(body, carry, split)
    return sums, {
        name: gradient(head, d_hidden[name], d_embeddings.get(name)) for name, head in trained.items()
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(blocks: int, head: LMHead, targets: jax.Array) -> jax.Array:
    embedding = _for_use({"": head})

    def body(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, block_targets = block
        return constrain(
            -negative_log_prob(_logits({"": head}, {"": hidden}, embedding)[""], block_targets), "BT"
        )

    return join_tokens(jax.lax.map(body, _split(blocks, head.hidden, targets)), targets.shape[1])


def _log_probs_forward(blocks: int, head: LMHead, targets: jax.Array) -> tuple[jax.Array, Any]:
    return _log_probs(blocks, head, targets), (head, targets)


def _log_probs_backward(blocks: int, saved: Any, cotangent: jax.Array) -> tuple[LMHead, None]:
    """The gradient of sum(cotangent * log P), which is that of `lm_head_sums` with the cotangent as mask."""
    head, targets = saved

    def token_loss(logits: Logits, targets: jax.Array, _: None) -> tuple[jax.Array, None]:
        return -negative_log_prob(logits["head"], targets), None

    _, gradients = _blockwise_forward(token_loss, blocks, {"head": head}, {}, targets, cotangent, None)
    return gradients["head"], None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _parts(heads: Mapping[str, LMHead]) -> tuple[Heads, Heads]:
    """The trained heads, and the others."""
    trained = {name: head for name, head in heads.items() if head.trained}
    return trained, {name: head for name, head in heads.items() if not head.trained}


def _with_fixed_embedding(head: LMHead) -> LMHead:
    return replace(head, embedding=jax.lax.stop_gradient(head.embedding))


def _masked_sums(
    token_loss: TokenLoss, logits: Logits, per_token: Any, mask: jax.Array, coefficients: Any
) -> Sums:
    loss, metrics = token_loss(logits, per_token, coefficients)
    return jnp.sum(loss * mask), jax.tree.map(lambda metric: jnp.sum(metric * mask), metrics)


def _split(blocks: int, hidden: Any, per_token: Any) -> Any:
    """Hidden states and per-token arrays [B, T, ...], split for the loop over blocks: [blocks, B, T / blocks, ...].

    All blocks keep the layout of activations. Otherwise the compiler would give them the layout that one block has in
    the LM head, and gather all blocks to use one.
    """

    def split(x: jax.Array, last: str) -> jax.Array:
        return constrain(split_tokens(blocks, x), "_BT" + last)

    states = jax.tree.map(lambda x: split(x, "D"), hidden)
    return states, jax.tree.map(lambda x: split(x, "_" * (x.ndim - 2)), per_token)


def _rows_apart(R: int, x: jax.Array, dims: str) -> jax.Array:
    return constrain_in_head(x.reshape(R, -1, *x.shape[1:]), f"R_{dims}")


def _hidden(heads: Heads) -> dict[str, jax.Array]:
    return {name: head.hidden for name, head in heads.items()}


def _for_use(heads: Heads) -> dict[str, jax.Array]:
    """The heads' embeddings, cast and laid out for products with hidden states."""
    return {
        name: constrain_in_head(head.embedding.astype(head.hidden.dtype), "VD")
        for name, head in heads.items()
    }


def _in_head(hidden: jax.Array) -> jax.Array:
    """A block's hidden states in the layout of the LM head.

    They first get the layout of activations, which they have outside: otherwise the compiler would gather all blocks to
    use one.
    """
    return constrain_in_head(constrain(hidden, "BTD"), "BTD")


def _products(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    return jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=jnp.float32)


def _products_in_head(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    return constrain_in_head(_products(hidden, embedding), "BTV")


def _logits(
    heads: Heads,
    hidden: Mapping[str, jax.Array] | None = None,
    embeddings: Mapping[str, jax.Array] | None = None,
) -> Logits:
    """The logits of these hidden states and embeddings (laid out for use), by default of the heads' own."""
    hidden = _hidden(heads) if hidden is None else hidden
    embeddings = _for_use(heads) if embeddings is None else embeddings
    return _caps(heads, {name: _products_in_head(_in_head(hidden[name]), embeddings[name]) for name in heads})


def _caps(heads: Heads, products: Mapping[str, jax.Array]) -> Logits:
    return {
        name: capped_logits(products[name], head.softcap, head.vocab_padding) for name, head in heads.items()
    }


def _zero_sums(token_loss: TokenLoss, heads: Heads, per_token: Any, coefficients: Any) -> Sums:
    """The sums before the first block; a call with an abstract token shows which metrics there are."""
    logits = {
        name: jax.ShapeDtypeStruct((head.embedding.shape[0],), jnp.float32) for name, head in heads.items()
    }
    token = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), per_token)
    shapes = jax.eval_shape(token_loss, logits, token, coefficients)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes)


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)
