"""Each formula against its definition, and the passes over blocks against the whole array."""

import math

import numpy as np
import pytest

from gemma2_jax.formats.merge_methods import (
    Linear,
    MergeMethod,
    Slerp,
    TaskArithmetic,
    Ties,
    WeightBlock,
)

DRAW = np.random.default_rng(0)


def arrays(count: int, shape: tuple[int, ...] = (6, 5), dtype: str = "float32") -> list[np.ndarray]:
    return [DRAW.normal(size=shape).astype(dtype) for _ in range(count)]


def merged(
    method: MergeMethod, models: list[np.ndarray], base: np.ndarray | None = None, rows: int = 2
) -> np.ndarray:
    """Merges in blocks of rows."""

    def blocks():
        for start in range(0, len(models[0]), rows):
            part = slice(start, start + rows)
            yield WeightBlock([model[part] for model in models], None if base is None else base[part])

    measured = method.measure(blocks)
    return np.concatenate([method.combine(block, measured) for block in blocks()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 1.0), (0.1, 0.25, 2.0), (-0.5, 1.7, 0.01, 3.3)])
def test_linear_is_that_of_mergekit_bit_for_bit(dtype, weights):
    """The formula of mergekit's LinearMergeTask: everything in the dtype of the tensors, normalised at the end."""
    torch = pytest.importorskip("torch")
    models = arrays(len(weights), (64, 33), "float32")
    models[0][0, :4], models[1][0, :4] = [0.0, -0.0, -0.0, 1e-30], [-0.0, -0.0, 0.0, 1e-30]
    kind = getattr(torch, dtype)
    tensors = torch.stack([torch.from_numpy(model).to(kind) for model in models])
    factors = torch.tensor(weights, dtype=kind)[:, None, None]
    expected = (factors * tensors).sum(dim=0) / factors.sum(dim=0)
    found = merged(Linear(weights, dtype), [model.astype(dtype) for model in models], rows=7)
    assert found.dtype == np.dtype(dtype)
    bits = np.uint32 if dtype == "float32" else np.uint16
    integers = torch.int32 if dtype == "float32" else torch.int16
    np.testing.assert_array_equal(found.view(bits), expected.view(integers).numpy().view(bits))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(t):
    a, b = arrays(2)
    found = merged(Slerp(t), [a, b])
    angle = math.acos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    expected = math.sin((1 - t) * angle) / math.sin(angle) * a + math.sin(t * angle) / math.sin(angle) * b
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_norm_of_vectors_of_one_norm():
    a, b = (array / np.linalg.norm(array) for array in arrays(2))
    assert np.linalg.norm(merged(Slerp(0.3), [a, b])) == pytest.approx(1, rel=1e-6)
    assert np.linalg.norm(0.7 * a + 0.3 * b) < 0.99


@pytest.mark.parametrize(
    "other", [lambda a: 1.5 * a, lambda a: -a, lambda a: 0 * a, lambda a: a + 1e-3 * a**2]
)
def test_slerp_of_parallel_vectors_is_linear(other):
    (a,) = arrays(1)
    b = other(a).astype(np.float32)
    if b.any():
        np.testing.assert_allclose(merged(Slerp(0.25), [a, b]), 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-7)
    else:  # without a direction, at a right angle
        expected = math.sin(0.75 * math.pi / 2) * a
        np.testing.assert_allclose(merged(Slerp(0.25), [a, b]), expected, rtol=1e-5)


def test_slerp_of_differences():
    base, a, b = arrays(3)
    found = merged(Slerp(0.4), [base + a, base + b], base)
    np.testing.assert_allclose(found, base + merged(Slerp(0.4), [a, b]), rtol=1e-4, atol=1e-5)


def test_task_arithmetic_and_interpolation_towards_the_start():
    base, a, b = arrays(3)
    found = merged(TaskArithmetic((0.5, -1.0)), [a, b], base)
    np.testing.assert_allclose(found, base + 0.5 * (a - base) - (b - base), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged(TaskArithmetic((0.0,)), [a], base), base)
    np.testing.assert_allclose(merged(TaskArithmetic((1.0,)), [a], base), a, rtol=1e-5, atol=1e-6)


def ties(models, base, weights, density):
    """The definition, without blocks: trim by sorting, elect signs, average those that agree."""
    trimmed = []
    for model in models:
        delta = (model - base).astype(np.float32)
        kept = np.sort(np.abs(delta).ravel())[::-1][: max(1, int(density * delta.size))]
        trimmed.append(np.where(np.abs(delta) >= kept[-1], delta, 0))
    weights = np.array(weights, np.float32)[:, None, None]
    weighted = weights * np.stack(trimmed)
    signs = np.where(weighted.sum(0) >= 0, 1, -1)
    agrees = np.sign(weighted) == signs
    total, divisor = (weighted * agrees).sum(0), (weights * agrees).sum(0)
    return base + total / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties(density, dtype):
    base, *models = (array.astype(np.float32) for array in arrays(4, (16, 9), dtype))
    found = merged(Ties((1.0, 2.0, 0.5), density), models, base, rows=3)
    np.testing.assert_allclose(found, ties(models, base, (1.0, 2.0, 0.5), density), rtol=1e-5, atol=1e-6)


def test_ties_by_hand():
    base = np.zeros((1, 5), np.float32)
    a = np.array([[4.0, 3.0, -2.0, 0.5, 0.0]], np.float32)  # density 0.6 keeps three numbers
    b = np.array([[2.0, -5.0, -4.0, 0.1, 0.2]], np.float32)
    np.testing.assert_array_equal(merged(Ties((1.0, 1.0), 0.6), [a, b], base), [[3.0, -5.0, -3.0, 0.0, 0.0]])
