"""What is tuned for one compiler gives the same numbers on any."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels import tuning
from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.kernels.softcap import negative_log_prob
from gemma2_jax.kernels.tuning import HeadPlan, computed_once, stays_in_loop
from tests.parameters import mostly_thorough


@mostly_thorough("plan", [HeadPlan("VD", True), HeadPlan("VD", False), HeadPlan("DV", False)], ids=str)
@mostly_thorough("dtype", [jnp.float32, jnp.bfloat16])
def test_every_plan_of_the_lm_head(plan: HeadPlan, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_HEAD_PLANS", {"cpu": plan})
    hidden = jax.random.normal(jax.random.key(0), (2, 9, 12), dtype)
    embedding = jax.random.normal(jax.random.key(1), (61, 12))
    targets, mask = jnp.arange(18).reshape(2, 9), jnp.ones((2, 9))

    def token_loss(logits: Any, targets: jax.Array, _: None) -> Any:
        return negative_log_prob(logits["a"], targets), None

    def total(sums: Any, *block_tokens: int) -> Any:
        def loss(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            head = {"a": LMHead(hidden, embedding, 30.0)}
            found: jax.Array = sums(token_loss, head, targets, mask, *block_tokens)[0]
            return found

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, embedding)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for one, other in zip(
        jax.tree.leaves(total(lm_head_sums, 4)), jax.tree.leaves(total(dense_sums)), strict=True
    ):
        exact = np.asarray(other, np.float32)
        np.testing.assert_allclose(np.asarray(one, np.float32), exact, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("number", [0, -5, 0.0, -1.5, float("inf")])
def test_what_stays_in_a_loop_is_not_changed(number: float) -> None:
    x = jnp.array([1.5, -2.0], jnp.bfloat16)
    found = stays_in_loop(x, jnp.asarray(number))
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)


def test_what_is_computed_once_is_not_changed() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 1, 3))
    np.testing.assert_array_equal(computed_once(x), x)
