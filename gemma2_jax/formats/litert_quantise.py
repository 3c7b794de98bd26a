"""How a LiteRT-LM file stores weights: float32, int8 or int4.

`int8` is the package's own (`model/quantised.py`): a float32 scale for each row of a matrix [out, in].

`int4` has a scale for each block of 32 neighbours in a row. It is another grid than the package's own: the engine's
products take positive scales only, and round them to bfloat16. So the scale is the smallest with which no number is
beyond -8 and 7, already rounded, and the codes are chosen for the rounded scale. The embedding is in int8.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.model.quantised import INT8, quantise

FORMATS = ("int8", "int4")
BLOCK = 32  # numbers of a row that share a scale in int4
_SMALLEST, _LARGEST = (
    2.0**-14,
    65280.0,
)  # scales that float16 and bfloat16 both hold exactly: 7 bits after the point


@dataclass(frozen=True)
class LiteRTStorage:
    """How one weight is stored.

    Attributes:
        shape: [out, in] of a matrix, [D] of a norm's scale.
        format: one of FORMATS; None for float32.
    """

    shape: tuple[int, ...]
    format: str | None

    @property
    def size(self) -> int:
        """Bytes of the numbers, without scales."""
        count = int(np.prod(self.shape))
        return {None: 4 * count, "int8": count, "int4": count // 2}[self.format]

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of the scales: [out] for int8, [out, in / 32] for int4, [] for float32."""
        if self.format == "int4":
            return self.shape[0], self.shape[1] // BLOCK
        return self.shape[:1] if self.format == "int8" else ()


def encode_rows(weight: np.ndarray, format_: str | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of a weight, or of some of its rows, as the file stores them, and their scales.

    Args:
        weight: [rows, in], or [D] for float32; of any dtype.
        name: name of the weight, for messages.

    Returns:
        float32, int8 [rows, in], or uint8 [rows, in / 2] with an even number of a row in the lower half of a byte; and
        float32 [rows], float16 [rows, in / 32], or none.

    Raises:
        UserError: the weight holds a number that is not finite, or too large for int4.
    """
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise UserError(
            f"{name} holds a number that is not finite, with which a model gives no text; check the source."
        )
    if format_ is None:
        return weight, np.empty(0, np.float32)
    return _int8(weight) if format_ == "int8" else _int4(weight, name)


def _int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quantised = quantise(jnp.asarray(weight), "VD", INT8)
    scales = np.asarray(quantised.scales)[:, 0]
    # The engine refuses a scale of 0, which a row of zeros has, and smaller ones than float32's normal numbers.
    return np.asarray(quantised.codes), np.maximum(scales, np.finfo(np.float32).tiny)


def _int4(weight: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    blocks = weight.reshape(len(weight), -1, BLOCK)
    exact = np.maximum(blocks.max(-1) / 7, blocks.min(-1) / -8)
    if exact.max(initial=0) > _LARGEST:
        raise UserError(f"{name} has values beyond what the scales of int4 can hold; choose --quantize int8.")
    scales = np.maximum(exact, _SMALLEST).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]), -8, 7).astype(np.int8).reshape(weight.shape)
    pairs = codes.view(np.uint8)
    return pairs[:, ::2] & 15 | pairs[:, 1::2] << 4, scales.astype(np.float16)
