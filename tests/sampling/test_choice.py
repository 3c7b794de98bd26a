"""The next token's distribution, against plain Python and against Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_jax.sampling.choice import TokenChoice

distribution = jax.jit(TokenChoice.distribution, static_argnums=0)


def cut(logits: list[float], choice: TokenChoice) -> set[int]:
    """Which ids stay: sorted and walked through, best first."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: choice.top_k]
    weights = [np.exp((logits[i] - max(logits)) / choice.temperature) for i in ranked]
    kept: set[int] = set()
    before = 0.0
    for index, weight in zip(ranked, weights, strict=True):
        if before / sum(weights) < (choice.top_p or 1.0):
            kept.add(index)
        before += weight
    return kept


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(12)),
    choice=st.sampled_from(
        [
            TokenChoice(1.0),
            TokenChoice(0.3, top_k=5),
            TokenChoice(1.0, top_k=100),
            TokenChoice(1.0, top_p=1e-6),
            TokenChoice(2.0, top_p=0.77),
            TokenChoice(1.0, top_p=1.0),
            TokenChoice(2.0, top_k=5, top_p=0.77),
            TokenChoice(2.0, top_k=12, top_p=0.31),
        ]
    ),
)
def test_what_is_cut(order, choice):
    logits = [0.37 * i - 2 for i in order]
    found = distribution(choice, jnp.array([logits]))[0]
    assert set(np.isfinite(found).nonzero()[0]) == cut(logits, choice)
    kept = np.isfinite(found)
    np.testing.assert_allclose(found[kept], np.array(logits)[kept] / choice.temperature, rtol=1e-6)


def test_rows_are_cut_on_their_own():
    logits = jnp.array([[0.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    found = np.isfinite(distribution(TokenChoice(1.0, top_k=1), logits))
    assert found.tolist() == [[False, False, True], [True, False, False]]


def test_equals_are_kept_together():
    found = np.isfinite(distribution(TokenChoice(1.0, top_k=2), jnp.array([[-1.0, -1.0, -1.0, 3.0]])))
    assert found.all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1.3, 40, None), (0.9, None, 0.8), (0.7, 40, 0.8), (2.0, 7, 0.5)],
)
@pytest.mark.filterwarnings("ignore")
def test_equals_hugging_face(temperature, top_k, top_p):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    logits = np.array(5 * jax.random.normal(jax.random.key(0), (6, 500)))
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)
    found = distribution(TokenChoice(temperature, top_k, top_p), jnp.asarray(logits))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.05, 0.15, 0.3, 0.5]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    many = jnp.broadcast_to(logits, (20_000, 4))
    share = np.bincount(TokenChoice(1.0)(many, keys), minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.05, 0.15, 0.3, 0.5], atol=0.015)  # four standard deviations
    share = np.bincount(TokenChoice(0.5, top_k=2)(many, keys), minlength=4) / 20_000
    np.testing.assert_allclose(share, [0, 0, 9 / 34, 25 / 34], atol=0.015)


def test_greedy_takes_the_first_of_the_best():
    logits = jnp.array([[1.0, 7.0, 7.0], [-3.0, -5.0, -9.0]])
    assert TokenChoice(0.0)(logits, jax.random.split(jax.random.key(0), 2)).tolist() == [1, 0]


KEYS = jax.random.split(jax.random.key(3), 64)


def drawn(choice: TokenChoice, logits: list[float]) -> set[int]:
    many = jnp.broadcast_to(jnp.array(logits), (64, len(logits)))
    return set(jax.jit(choice)(many, KEYS).tolist())


def test_all_of_the_probability_cuts_nothing():
    """Sums of 256,000 float32 probabilities reach 1 before the last of them."""
    logits = 5 * jax.random.normal(jax.random.key(0), (1, 256_000))
    np.testing.assert_array_equal(distribution(TokenChoice(1.0, top_p=1.0), logits), logits)
    np.testing.assert_array_equal(distribution(TokenChoice(1.0, top_k=256_000), logits), logits)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1 - 1e-4, 1 - 1e-6])
def test_the_cut_is_where_float64_has_it(top_p):
    logits = 5 * jax.random.normal(jax.random.key(0), (1, 256_000))
    p = np.exp(np.asarray(logits[0], np.float64))
    p = np.sort(p / p.sum())[::-1]
    before = np.cumsum(p) - p
    expected = int(np.sum(before < top_p))
    found = int(np.sum(np.isfinite(distribution(TokenChoice(1.0, top_p=top_p), logits))))
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-6])
def test_a_temperature_near_zero_takes_the_best(temperature):
    assert drawn(TokenChoice(temperature), [1.0, -3.0, 2.5, 2.0]) == {2}
    assert drawn(TokenChoice(temperature), [-1.0, -3.0, -2.5]) == {0}
    assert drawn(TokenChoice(temperature, top_k=2, top_p=0.9), [1.0, 2.0, 29.9, 30.0]) == {3}
    assert drawn(TokenChoice(temperature), [30.0, 1.0, 30.0]) == {0, 2}  # equals stay equals


@pytest.mark.parametrize("temperature", [1e4, 1e30, 1e38, 1e300])
def test_at_a_huge_temperature_padding_is_no_token_yet(temperature):
    logits = [3.0, -30.0, 30.0, -1e30, -jnp.inf]
    assert drawn(TokenChoice(temperature), logits) == {0, 1, 2}
    assert drawn(TokenChoice(temperature, top_p=1.0), logits) == {0, 1, 2}
    assert drawn(TokenChoice(temperature, top_k=5), logits) == {0, 1, 2}


def test_a_tiny_top_p_takes_the_best():
    assert drawn(TokenChoice(1.0, top_p=1e-30), [1.0, 1.1, 0.9]) == {1}


@pytest.mark.parametrize(
    "choice", [TokenChoice(0.0), TokenChoice(1.0), TokenChoice(1.0, top_k=2), TokenChoice(1.0, top_p=0.5)]
)
def test_nan_is_no_token(choice):
    assert drawn(choice, [1.0, jnp.nan, 2.0, 3.0]) == {4}
