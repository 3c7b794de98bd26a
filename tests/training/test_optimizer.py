"""Schedules at the steps that matter, and rejected settings."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.model.weights import Weight, init_params, weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.training.optimizer import build_optimizer, learning_rate_schedule
from tests.parameters import mostly_thorough


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine"}, {0: 0.1, 4: 0.5, 9: 1.0, 54: 0.55, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 0.1}, {0: 0.1, 4: 0.5, 9: 1.0, 54: 0.55, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 1}, {0: 1.0, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 0}, {0: 1.0, 33: 0.775, 66: 0.325, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 100}, {0: 0.01, 98: 0.99, 99: 0.1}),
        ({"schedule": "cosine", "final_fraction": 0.0}, {54: 0.5, 99: 0.0}),
        ({"schedule": "wsd", "decay_steps": 20}, {0: 0.1, 9: 1.0, 50: 1.0, 79: 1.0, 89: 0.55, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 1}, {98: 1.0, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 90}, {8: 0.9, 9: 1.0, 10: 0.99, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 100, "warmup_steps": 0}, {0: 0.991, 99: 0.1}),
        ({"schedule": "constant", "final_fraction": 1.0}, {0: 0.1, 9: 1.0, 99: 1.0}),
        ({"schedule": "constant", "final_fraction": 1.0, "warmup_steps": 100}, {0: 0.01, 99: 1.0}),
        ({"schedule": "constant", "final_fraction": 1.0, "warmup_steps": 0}, {0: 1.0, 99: 1.0}),
    ],
)
def test_learning_rate(toy_run: RunConfig, changes: dict[str, Any], expected: dict[int, float]) -> None:
    config = replace(toy_run.optimizer, **{"learning_rate": 1.0, "warmup_steps": 10, **changes})
    schedule = learning_rate_schedule(config, steps=100)
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 777])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_last_step_has_the_final_rate_exactly(toy_run: RunConfig, schedule: Any, steps: int) -> None:
    decay = 0.2 if schedule == "wsd" else 0
    config = replace(
        toy_run.optimizer, learning_rate=1e-3, schedule=schedule, warmup_steps=0.1, decay_steps=decay
    )
    rates = [float(learning_rate_schedule(config, steps)(step)) for step in range(steps)]
    assert rates[-1] == np.float32(1e-4)
    assert min(rates) > 0
    if steps > 2:
        assert max(rates) == pytest.approx(1e-3, rel=1e-6)


def test_the_optimizer_follows_the_schedule(toy_run: RunConfig) -> None:
    """Checks the updates, not only the schedule: with AdamW without momentum, each is as large as the rate."""
    config = replace(
        toy_run.optimizer,
        beta1=0.0,
        beta2=0.0,
        eps=1e-30,
        weight_decay=0.0,
        learning_rate=1.0,
        warmup_steps=2,
    )
    optimizer = build_optimizer(config, 4, {"w": Weight("D", (1,), fan_in="D")})
    params = {"w": jnp.ones(1)}
    state = optimizer.init(params)
    found = []
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.full(1, 0.5)}, state, params)
        found.append(-float(updates["w"][0]))
    assert found == pytest.approx([0.5, 1.0, 0.55, 0.1], rel=1e-6)


MUON: dict[str, Any] = {"kind": "muon", "momentum": 0.95}


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five steps of the quintic Newton-Schulz iteration (Jordan et al., 2024), in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        squared = x @ x.T
        x = 3.4445 * x + (-4.7750 * squared + 2.0315 * squared @ squared) @ x
    return x


@mostly_thorough(
    ("dims", "shape", "fan_in", "rows"),
    [
        ("PDNH", (2, 8, 3, 4), "D", 8),
        ("PNHD", (2, 3, 4, 8), "NH", 12),
        ("PDF", (2, 8, 20), "D", 8),
        ("DF", (8, 20), "D", 8),
    ],
)
def test_muon_orthogonalises_each_layers_matrix(
    toy_run: RunConfig, dims: str, shape: tuple[int, ...], fan_in: str, rows: int
) -> None:
    """Two steps, against the formula: momentum of Nesterov's kind, Newton-Schulz, the scale of arXiv 2502.16982."""
    constant: dict[str, Any] = {
        "learning_rate": 0.5,
        "schedule": "constant",
        "final_fraction": 1.0,
        "warmup_steps": 0,
    }
    config = replace(toy_run.optimizer, **constant, **MUON, weight_decay=0.1, clip_norm=1e9)
    optimizer = build_optimizer(config, 4, {"w": Weight(dims, shape, fan_in)})
    random = np.random.default_rng(0)
    gradients, weight = random.normal(size=(2, *shape)), random.normal(size=shape)

    params = {"w": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)

    beta = MUON["momentum"]
    average = (1 - beta) * (beta * gradients[0] + gradients[1])
    ahead = beta * average / (1 - beta**3) + (1 - beta) * gradients[1] / (1 - beta**2)
    matrices = ahead.reshape(-1, rows, ahead.size // rows // (2 if "P" in dims else 1))
    scale = 0.2 * max(matrices.shape[1:]) ** 0.5
    direction = np.stack([scale * orthogonalised(matrix) for matrix in matrices]).reshape(shape)
    np.testing.assert_allclose(updates["w"], -0.5 * (direction + 0.1 * weight), rtol=2e-4, atol=2e-5)


@pytest.mark.thorough
def test_muon_leaves_embedding_and_norms_to_adamw(toy_run: RunConfig) -> None:
    specs = weight_specs(toy_run.model)
    params = init_params(specs, jax.random.key(0))
    gradients = init_params(specs, jax.random.key(1))
    unclipped = replace(toy_run.optimizer, clip_norm=1e9)
    found = {}
    for config in (unclipped, replace(unclipped, **MUON)):
        optimizer = build_optimizer(config, 4, specs)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        found[config.kind] = jax.tree_util.tree_leaves_with_path(updates)
    for (path, adamw), (_, muon) in zip(found["adamw"], found["muon"], strict=True):
        is_matrix = any(entry.key in ("attention", "mlp") for entry in path)
        assert np.array_equal(adamw, muon) != is_matrix, path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("eps", 0.0),
        ("clip_norm", -1.0),
        ("warmup_steps", -1),
        ("decay_steps", -1),
        ("warmup_steps", -0.1),
        ("warmup_steps", 1.0),
        ("decay_steps", 2.5),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("final_fraction", 1.5),
    ],
)
def test_refused(toy_run: RunConfig, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer.{name} is {value}"):
        replace(toy_run.optimizer, **{name: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decay_steps": 5}, "decay_steps is 5, which optimizer.schedule cosine does not use; set it to 0"),
        (
            {"schedule": "constant", "final_fraction": 1.0, "decay_steps": 5},
            "decay_steps is 5, which optimizer.schedule constant does not use; set it to 0",
        ),
        ({"schedule": "wsd"}, "decay_steps is 0; with optimizer.schedule wsd it must be at least 1"),
        (
            {"momentum": 0.9},
            "momentum is 0.9, which optimizer.kind adamw does not use; set it to null, or write optimizer=muon",
        ),
        ({"kind": "muon"}, "momentum is null; it must be at least 0 and below 1 with optimizer.kind muon"),
        (
            {"kind": "muon", "momentum": 1.0},
            "momentum is 1.0; it must be at least 0 and below 1 with optimizer.kind muon",
        ),
        (
            {"schedule": "constant"},
            "final_fraction is 0.1, which optimizer.schedule constant does not use; set it to 1",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(
    toy_run: RunConfig, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(toy_run.optimizer, **changes)
