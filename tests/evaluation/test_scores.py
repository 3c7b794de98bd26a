"""Scores against plain NumPy on all logits, alone and beside a teacher, on one device and on a mesh."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.data.batch import Batch
from gemma2_jax.evaluation.scores import BINS, Scores, add_sums, build_scoring, score, scores_of
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.model.models import vivid

B, T = 4, 16
BYTES = [(7 * number) % 5 for number in range(97)]


@pytest.fixture(scope="module")
def models(toy_config: ModelConfig) -> dict[str, Gemma2]:
    """Student and teacher; the teacher's predictions are near the student's, as after distillation."""
    sizes = replace(toy_config, num_layers=2)
    student = vivid(sizes)
    noise = Gemma2.init(sizes, jax.random.key(3)).params()
    near = jax.tree.map(lambda weight, other: weight + 0.3 * other, student.params(), noise)
    return {"student": student, "teacher": Gemma2(sizes, near)}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    draw = np.random.default_rng(1)

    def batch() -> Batch:
        segments = np.sort(draw.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        segments[-1, 9:] = 0
        starts = np.maximum.accumulate(
            np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(T), 0), axis=1
        )
        tokens = draw.integers(0, 97, (B, T + 1)).astype(np.int32)
        mask = ((segments > 0) & (draw.random((B, T)) < 0.8)).astype(np.float32)
        positions = (np.arange(T) - starts).astype(np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, mask)

    return [batch(), batch()]


def dense(models: dict[str, Gemma2], batches: list[Batch]) -> dict[str, Any]:
    """The scores from all logits, in float64."""
    P: list[np.ndarray] = []
    Q: list[np.ndarray] = []
    y: list[np.ndarray] = []
    for batch in batches:
        inside = batch.loss_mask > 0
        for name, found in (("student", P), ("teacher", Q)):
            logits = models[name](
                jnp.asarray(batch.tokens), jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids)
            )
            exact = np.asarray(logits, np.float64)[inside]
            exponentials = np.exp(exact - exact.max(-1, keepdims=True))
            found.append(exponentials / exponentials.sum(-1, keepdims=True))
        y.append(batch.targets[inside])
    p, q, text = np.concatenate(P), np.concatenate(Q), np.concatenate(y)
    n = np.arange(len(text))
    top, confidence = p.argmax(-1), p.max(-1)
    hit = top == text
    calibration = 0.0
    for low in np.arange(BINS) / BINS:
        inside_bin = (confidence >= low) & (confidence < low + 1 / BINS)
        if inside_bin.any():
            gap = abs(hit[inside_bin].mean() - confidence[inside_bin].mean())
            calibration += inside_bin.mean() * gap
    nats = -np.log(p[n, text]).sum()
    size = sum(BYTES[token] for token in text)
    return {
        "tokens": len(text),
        "bytes": size,
        "nats": nats,
        "cross_entropy": nats / len(text),
        "perplexity": np.exp(nats / len(text)),
        "bits_per_byte": nats / math.log(2) / size,
        "entropy": -(p * np.log(p)).sum(-1).mean(),
        "accuracy": hit.mean(),
        "calibration_error": calibration,
        "kl": (q * (np.log(q) - np.log(p))).sum(-1).mean(),
        "agreement": (top == q.argmax(-1)).mean(),
        "acceptance": 1 - abs(p - q).sum(-1).mean() / 2,
        "confidence_difference": abs(confidence - q[n, top]).mean(),
        "teacher_entropy": -(q * np.log(q)).sum(-1).mean(),
    }


def compare(found: Scores, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-4, abs=1e-6), name


def scored(models: dict[str, Gemma2], batches: list[Batch], config: MeshConfig, devices: int) -> Any:
    mesh = build_mesh(config, jax.devices()[:devices])
    placed = {
        name: Gemma2(
            model.config,
            jax.device_put(
                model.params(),
                jax.tree.map(
                    lambda leaf: leaf.sharding, abstract_params(weight_specs(model.config), mesh=mesh)
                ),
            ),
        )
        for name, model in models.items()
    }
    with jax.set_mesh(mesh):
        return score(build_scoring(ComputeConfig(), 12), placed, batches, BYTES, mesh)


def test_scores_equal_those_of_all_logits(models: dict[str, Gemma2], batches: list[Batch]) -> None:
    expected = dense(models, batches)
    assert 0.05 < expected["acceptance"] < 0.99  # the models differ
    assert expected["calibration_error"] > 0.01
    each = [scored(models, [batch], MeshConfig(), 1) for batch in batches]
    found = scores_of(add_sums(each))
    compare(found, expected)
    assert sum(each.tokens for each in found.bins) == found.tokens
    hits = sum(each.tokens * (each.accuracy or 0) for each in found.bins)
    assert hits == pytest.approx(expected["accuracy"] * found.tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 4, 1, 2)])
def test_a_mesh_gives_the_same_scores(
    models: dict[str, Gemma2], batches: list[Batch], mesh: MeshConfig
) -> None:
    # 97 tokens are divided by no mesh: padded with rows that are no tokens.
    padded = {name: padded_vocabulary(model, 104) for name, model in models.items()}
    compare(scores_of(scored(padded, batches, mesh, 8)), dense(models, batches))


def padded_vocabulary(model: Gemma2, rows: int) -> Gemma2:
    config = replace(model.config, vocab_size=rows, vocab_padding=rows - model.config.vocab_size)
    params = model.params()
    table = params["embedder"]["embedding"]
    params["embedder"]["embedding"] = jnp.pad(table, ((0, rows - len(table)), (0, 0)), constant_values=9.0)
    return Gemma2(config, params)


def test_numbers_that_json_cannot_hold_are_null() -> None:
    bins = [[2.0] + [0.0] * (BINS - 1), [float("nan")] + [0.0] * (BINS - 1), [0.0] * BINS]
    sums = {
        "targets": 2.0,
        "cross_entropy": 4000.0,
        "entropy": float("nan"),
        "accuracy": 0.0,
        "bytes": 0.0,
        "bins": bins,
    }
    found = scores_of(sums)
    assert (found.nats, found.cross_entropy) == (4000.0, 2000.0)
    assert (found.perplexity, found.entropy, found.bits_per_byte, found.calibration_error) == (None,) * 4
    assert found.kl is None
    assert found.bins[0].confidence is None
