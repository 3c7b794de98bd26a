"""Soft-capped, grouped-query attention on Hopper GPUs, by tokamax's Pallas kernel (extra `cuda12`)."""

from types import ModuleType

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.kernels.sharded_attention import on_each_device
from gemma2_jax.machine import is_installed
from gemma2_jax.sharding.layout import layout_in_use, sequence_shares

_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # JAX's names for them


def tokamax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float,
    implementation: str = "mosaic_gpu",
) -> jax.Array:
    """Attention of a sequence to itself, differentiable in query, key and value.

    tokamax has no segments. But a token attends to itself and to the tokens directly before it, within its segment and
    the window, and tokamax accepts their number for each query: its position, limited by the window.

    Args:
        query: [B, T, N, H] in bfloat16; key, value: [B, T, K, H]; positions, segment_ids: [B, T].
        implementation: one of tokamax's implementations; tests take one that runs on a CPU.

    Returns:
        [B, T, N, H].

    Raises:
        UserError: tokamax is not installed, or does not support these settings or this GPU.
    """
    tokamax = _tokamax()
    if sequence_shares() > 1:
        raise UserError(
            "compute.attention.kernel is tokamax, which needs whole sequences, but mesh.sequence splits them over "
            f"{sequence_shares()} devices; choose mesh.sequence=1, or compute.attention.kernel=blockwise."
        )
    if query.dtype == jnp.float32 and implementation == "mosaic_gpu":
        raise UserError(
            "compute.attention.kernel is tokamax, which computes in 16 bits, but compute.dtype is float32; choose "
            "compute.dtype=bfloat16, or compute.attention.kernel=blockwise."
        )

    def attend(
        before: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, *_: jax.Array
    ) -> jax.Array:
        mixed: jax.Array = tokamax.dot_product_attention(
            query,
            key,
            value,
            scale=1.0,
            local_window_size=(before[:, None], 0),
            logits_soft_cap=softcap,
            implementation=implementation,
        )
        return mixed

    before = positions if window is None else jnp.minimum(positions, window - 1)
    try:
        return on_each_device(attend, before, layout_in_use().spec("BT"), query, key, value, segment_ids)
    except NotImplementedError as error:
        raise UserError(
            f"compute.attention.kernel is tokamax, which fails: {str(error).rstrip('.')}; choose auto or blockwise."
        ) from None


def suits(query: jax.Array, device_kind: str) -> bool:
    """Whether `auto` takes tokamax for these queries [B, T, N, H] on a device of this kind.

    It does on a Hopper GPU, in bfloat16, with whole sequences and the head widths of the released models, if tokamax is
    installed.
    """
    return (
        device_kind.startswith(_HOPPER)
        and query.dtype == jnp.bfloat16
        and query.shape[-1] in (128, 256)
        and sequence_shares() == 1
        and is_installed("tokamax")
    )


def check_tokamax_installed() -> None:
    """Raises UserError if tokamax, or absl, which holds its flags, is not installed."""
    if not (is_installed("tokamax") and is_installed("absl")):
        raise UserError(
            "compute.attention.kernel is tokamax, which is not installed; pip install -e '.[cuda12]', or choose "
            "auto or blockwise."
        )


def _tokamax() -> ModuleType:
    check_tokamax_installed()
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or tokamax parses our command line, and fails at our options
    return tokamax
