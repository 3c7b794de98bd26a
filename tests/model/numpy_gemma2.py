"""Gemma 2 once more, straight from the report's formulas: NumPy, float64, loops instead of masks and einsums."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma2_jax.model.config import ModelConfig


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + scale)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, position: float, base: float) -> np.ndarray:
    """One head [H] as H/2 complex numbers, each turned by its own angle."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position / base ** (np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: list[int], cap: float) -> np.ndarray:
    """One query [N, H] to those keys [S, K, H] that it sees: [N, H]."""
    N, group = len(query), len(query) // key.shape[1]
    mixed = np.zeros_like(query)
    for n in range(N):
        scores = softcap(key[seen, n // group] @ query[n], cap)
        weights = np.exp(scores - scores.max())
        mixed[n] = weights / weights.sum() @ value[seen, n // group]
    return mixed


def seen_keys(i: int, positions: np.ndarray, segment_ids: np.ndarray, window: int | None) -> list[int]:
    """Which tokens of its row the i-th sees."""
    return [
        j
        for j in range(len(positions))
        if segment_ids[i] == segment_ids[j]
        and positions[j] <= positions[i]
        and (window is None or positions[j] > positions[i] - window)
    ]


def forward(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray,
    segment_ids: np.ndarray,
) -> np.ndarray:
    """Logits [T, V] of one row of tokens [T]."""
    embedding = np.asarray(params["embedder"]["embedding"], np.float64)
    x = embedding[tokens] * np.sqrt(config.d_model)
    for layer in range(config.num_layers):
        kind = "global_block" if layer % 2 else "local_block"
        is_global = layer % (2 * config.global_every) == 2 * config.global_every - 1
        window = None if is_global else config.sliding_window
        x = _block(config, _layer(params["pairs"][kind], layer // 2), x, positions, segment_ids, window)
    final = rms_norm(x, np.asarray(params["final_norm"]["scale"], np.float64), config.norm_eps)
    return softcap(final @ embedding.T, config.final_logit_softcap)


def _layer(stacked: Any, index: int) -> Any:
    if isinstance(stacked, Mapping):
        return {name: _layer(inner, index) for name, inner in stacked.items()}
    return np.asarray(stacked[index], np.float64)


def _block(
    config: ModelConfig,
    weights: Any,
    x: np.ndarray,
    positions: np.ndarray,
    segment_ids: np.ndarray,
    window: int | None,
) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, weights[name]["scale"], config.norm_eps)

    def heads(name: str, normed: np.ndarray) -> np.ndarray:
        return np.tensordot(normed, weights["attention"][name], 1)

    def turn(each: np.ndarray) -> np.ndarray:
        rows = zip(each, positions, strict=True)
        return np.array([[rotate(head, p, config.rope_base) for head in row] for row, p in rows])

    normed = norm(x, "pre_attention_norm")
    query = turn(heads("query", normed)) / np.sqrt(config.query_pre_attn_scalar)
    key, value = turn(heads("key", normed)), heads("value", normed)
    mixed = np.array(
        [
            attend(
                query[i], key, value, seen_keys(i, positions, segment_ids, window), config.attn_logit_softcap
            )
            for i in range(len(x))
        ]
    )
    x = x + norm(np.tensordot(mixed, weights["attention"]["output"], 2), "post_attention_norm")
    normed = norm(x, "pre_mlp_norm")
    hidden = gelu_tanh(normed @ weights["mlp"]["gate"]) * (normed @ weights["mlp"]["up"])
    return x + norm(hidden @ weights["mlp"]["down"], "post_mlp_norm")
