"""The K types of GGUF, which `gguf` reads and only we write: read back by it, their errors, and bounded memory."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gemma2_jax.formats import k_quants
from tests.parameters import mostly_thorough

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

KINDS = ("q4_k", "q5_k", "q6_k")


def gaussians(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unpacked(packed: np.ndarray, kind: str) -> np.ndarray:
    found: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()])
    return found


def relative_error(values: np.ndarray, kind: str, weights: np.ndarray | float = 1.0, **arguments) -> float:
    error = values - unpacked(k_quants.pack(values, kind, **arguments), kind)
    return float(np.sqrt((weights * error**2).mean() / (weights * values**2).mean()))


@mostly_thorough(("kind", "most"), [("q4_k", 0.073), ("q6_k", 0.0185), ("q5_k", 0.037)])
def test_the_error_on_gaussians(kind, most):
    """For comparison: Q4_0, with the 4.5 bits of Q4_K, has 8.6 %."""
    assert relative_error(gaussians(1024, 1024), kind) < most


@mostly_thorough("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_error_does_not_depend_on_the_scale(kind, scale):
    values = gaussians(64, 512)
    assert relative_error(values * np.float32(scale), kind) == pytest.approx(
        relative_error(values, kind), rel=0.03
    )


@mostly_thorough(("kind", "most"), [("q5_k", 0.04), ("q6_k", 0.025), ("q4_k", 0.075)])
def test_small_numbers_whose_unit_has_few_digits_in_float16(kind, most):
    assert relative_error(gaussians(64, 512) * np.float32(1e-5), kind) < most


@mostly_thorough(("kind", "most"), [("q5_k", 0.005), ("q6_k", 0.005), ("q4_k", 0.005)])
def test_numbers_far_from_zero(kind, most):
    assert relative_error(10 + gaussians(64, 512) * np.float32(0.01), kind) < most


@mostly_thorough("kind", KINDS)
def test_a_sub_block_that_is_small_beside_another_becomes_its_mean(kind):
    values = gaussians(64, 256)
    values[:, :128] = np.abs(values[:, :128]) * 50  # without an offset
    values[:, 128:] *= 0.1
    error = (values - unpacked(k_quants.pack(values, kind), kind))[:, 128:]
    assert np.sqrt((error**2).mean()) < 0.11


@mostly_thorough("kind", KINDS)
def test_important_inputs_have_smaller_errors(kind):
    values = gaussians(64, 512)
    importance = np.random.default_rng(1).exponential(size=512).astype(np.float32) ** 3
    plain = relative_error(values, kind, importance)
    assert relative_error(values, kind, importance, importance=importance) < 0.93 * plain


@mostly_thorough("kind", KINDS)
def test_inputs_that_never_occur_are_stored_too(kind):
    values = gaussians(8, 512)
    importance = np.zeros(512, np.float32)
    np.testing.assert_array_equal(k_quants.pack(values, kind, importance), k_quants.pack(values, kind))
    importance[:128] = 1.0  # half of a super-block, and none of the next one
    found = unpacked(k_quants.pack(values, kind, importance), kind)
    assert np.abs(found - values).max() < 0.6


@mostly_thorough("kind", KINDS)
def test_special_blocks(kind):
    """Zeros stay exact; so do constants, to the precision of float16; an outlier costs its own sub-block only."""
    assert not unpacked(k_quants.pack(np.zeros((2, 256)), kind), kind).any()
    for constant in (0.75, -0.75):
        found = unpacked(k_quants.pack(np.full((1, 256), constant), kind), kind)
        np.testing.assert_allclose(found, constant, rtol=0.01)
    one_sided = np.abs(gaussians(4, 256)) + 1
    for values in (one_sided, -one_sided):
        assert relative_error(values, kind) < 0.05
    values = gaussians(1, 256) * 0.01
    values[0, 0] = 1.0
    found = unpacked(k_quants.pack(values, kind), kind)
    assert found[0, 0] == pytest.approx(1.0, rel=0.04)


@mostly_thorough("kind", KINDS)
def test_a_block_does_not_depend_on_its_tensor(kind):
    values, importance = gaussians(400, 768), np.abs(gaussians(768))  # more than are packed at a time
    whole = k_quants.pack(values, kind, importance)
    assert whole.shape == (400, 3 * k_quants.BYTES[kind])
    np.testing.assert_array_equal(k_quants.pack(values[333:335], kind, importance), whole[333:335])
    rounded = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        k_quants.pack(rounded, kind), k_quants.pack(rounded.astype(np.float32), kind)
    )


@mostly_thorough("kind", KINDS)
def test_packing_again_changes_little(kind):
    """The numbers of a dequantised tensor lie on a grid that the search finds again, almost everywhere."""
    once = unpacked(k_quants.pack(gaussians(64, 256), kind), kind)
    assert relative_error(once, kind) < 0.4 * relative_error(gaussians(64, 256), kind)


@mostly_thorough("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
def test_what_a_type_cannot_hold_is_recognisable(kind, value):
    values = gaussians(3, 256)
    values[1, 200] = value
    with np.errstate(invalid="ignore"):
        found = unpacked(k_quants.pack(values, kind), kind)
    assert np.isfinite(found[[0, 2]]).all()
    assert not np.isfinite(found[1]).all()


def test_memory_is_bounded():
    values = np.ones((2048, 4096), ml_dtypes.bfloat16)  # 32 MB as float32
    k_quants.pack(values[:1], "q4_k")
    tracemalloc.start()
    try:
        packed = k_quants.pack(values, "q4_k")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - packed.nbytes < 12e6
