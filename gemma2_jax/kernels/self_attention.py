"""Attention of a sequence to itself, and the choice of its kernel."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.kernels.blockwise_attention import LONGEST, blockwise_attention
from gemma2_jax.kernels.looped_attention import looped_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.sharded_attention import on_each_device
from gemma2_jax.kernels.splash_attention import LANES, splash_attention
from gemma2_jax.kernels.tokamax_attention import suits, tokamax_attention
from gemma2_jax.sharding.layout import layout_in_use, sequence_shares

Kernel = Literal["reference", "blockwise", "splash", "tokamax"]

# Kernels that run only on some platforms, and their hardware. On a CPU, splash is interpreted, for tests.
_PLATFORMS = {"splash": ("tpu", "cpu"), "tokamax": ("gpu",)}
_MADE_FOR = {"splash": "TPUs", "tokamax": "GPUs"}


@dataclass(frozen=True)
class AttentionConfig:
    """The kernel of self-attention; all kernels compute the same, up to rounding.

    Attributes:
        kernel: `splash` is JAX's own kernel for TPUs (interpreted on a CPU, for tests); `tokamax` is for Hopper GPUs
            and needs the extra `cuda12`; `blockwise` runs everywhere; `reference` is the plain form, with all scores at
            once. `auto` takes splash on TPUs, tokamax on Hopper GPUs where it is installed and supports the shapes, and
            blockwise elsewhere.
        block_queries, block_keys: size of splash's blocks of scores, multiples of 128; a short sequence gets shorter
            blocks. Larger blocks take fewer steps and more of the chip's fast memory: at head width 256, 1024 x 1024
            still compiles for a v5e, and 1024 x 2048 does not.
    """

    kernel: Literal["auto", "reference", "blockwise", "splash", "tokamax"] = "auto"
    block_queries: int = 512
    block_keys: int = 512

    def __post_init__(self) -> None:
        for name in ("block_queries", "block_keys"):
            size = getattr(self, name)
            if size < LANES or size % LANES:
                raise UserError(
                    f"compute.attention.{name} is {size}; it must be a multiple of {LANES}, and at least that."
                )


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float,
    config: AttentionConfig = AttentionConfig(),
) -> jax.Array:
    """`attention` of a sequence to itself by the kernel that `config` names, differentiable in query, key and value.

    A token attends to the tokens of its own segment that are not after it and are inside the window. Within a segment,
    positions go up by one from token to token, so the distance in the sequence decides whether a key is inside the
    window.

    Args:
        query: [B, T, N, H], scaled; key, value: [B, T, K, H]; positions, segment_ids: [B, T].
        window: the query at position i attends to i - window + 1 .. i; None for 0 .. i.
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        [B, T, N, H] in query's dtype.

    Raises:
        UserError: the kernel that `config` names cannot be used here.
    """
    platform, kind = device_in_use()
    kernel = choose_kernel(config, platform, tokamax_suits=suits(query, kind))
    if kernel == "reference":
        visible = visible_keys(positions, positions, segment_ids, segment_ids, window)
        return attention(query, key, value, visible, softcap)
    if kernel == "splash":
        sizes = config.block_queries, config.block_keys
        interpret = platform == "cpu"
        return splash_attention(query, key, value, segment_ids, window, softcap, *sizes, interpret)
    if kernel == "tokamax":
        return tokamax_attention(query, key, value, positions, segment_ids, window, softcap)
    if query.shape[1] <= LONGEST and sequence_shares() == 1:
        return blockwise_attention(query, key, value, positions, segment_ids, window, softcap)

    def attend(indices: jax.Array, *arrays: jax.Array) -> jax.Array:
        return looped_attention(window, softcap, *arrays, indices)

    indices = jnp.arange(query.shape[1])
    return on_each_device(attend, indices, layout_in_use().spec("T"), query, key, value, segment_ids)


def choose_kernel(config: AttentionConfig, platform: str, tokamax_suits: bool = False) -> Kernel:
    """The kernel that `config` selects for programs that run on `platform` (tpu, gpu, cpu).

    Raises:
        UserError: the kernel that it names does not run there.
    """
    if config.kernel == "auto":
        if platform == "gpu" and tokamax_suits:
            return "tokamax"
        return "splash" if platform == "tpu" else "blockwise"
    if platform not in _PLATFORMS.get(config.kernel, (platform,)):
        raise UserError(
            f"compute.attention.kernel is {config.kernel}, which is for {_MADE_FOR[config.kernel]}, but this program "
            f"is for a {platform}; choose auto or blockwise."
        )
    return config.kernel


def device_in_use() -> tuple[str, str]:
    """Platform and kind of the device that the traced program will run on: the mesh's in context, or JAX's default.

    They differ where a program is compiled ahead of time for devices that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind
