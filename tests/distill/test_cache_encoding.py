"""Encodings of teacher distributions: unbiased where they claim to be, with the tail where there is one.

The gradient of the forward KL with respect to the student's logits is (sum of w) P_S - w for a teacher's weights
w, and P_S - P_T for the whole of its distribution: an estimate w with the mean P_T gives that gradient on average.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig, cumulative, encode, run_weights
from gemma2_jax.distill.cache.records import Packer, log_grid
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.objectives.terms import sparse_forward_kl
from tests.parameters import mostly_thorough

V, R = 40, 20_000  # tokens, and independent estimates of the same distribution
MODEL = ModelConfig(V, 2, 8, 1, 1, 8, 8, None, 8.0)


def logits(size: int = V, scale: float = 1.5, seed: int = 0) -> np.ndarray:
    return np.asarray(30 * jnp.tanh(jax.random.normal(jax.random.key(seed), (size,)) * scale / 30))


def softmax(values: np.ndarray) -> np.ndarray:
    p = np.exp(values.astype(np.float64) - values.max())
    return np.asarray(p / p.sum())


def cached(config: EncodingConfig, values: np.ndarray, copies: int) -> SparseTargets:
    """Targets decoded from a cache of `copies` tokens with equal logits: [1, copies, K]."""
    rows = jnp.broadcast_to(jnp.asarray(values), (copies, len(values)))
    made = encode(config, rows, len(values), jnp.uint32(3), jnp.arange(copies))
    packer = Packer(config, log_grid(config, MODEL), len(values), copies)
    packed = packer.pack(jax.tree.map(np.asarray, made), 0)
    sparse, _ = packer.unpack([packed.record], packed.largest)
    return sparse


def dense(sparse: SparseTargets, size: int) -> np.ndarray:
    """The weights as [copies, V]."""
    whole = np.zeros((sparse.ids.shape[1], size))
    np.add.at(
        whole, (np.arange(len(whole))[:, None], sparse.ids[0]), np.exp(sparse.log_weights[0].astype(float))
    )
    return whole


def gradient(student: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights.sum(-1, keepdims=True) * softmax(student) - weights


def largest_deviation(gradients: np.ndarray, expected: np.ndarray, sigma: np.ndarray) -> float:
    """The largest deviation of the mean estimate from its expectation over the coordinates, in standard errors."""
    return float(np.max(np.abs(gradients.mean(0) - expected) / (sigma / math.sqrt(len(gradients)))))


# If the estimates are unbiased, the mean of a coordinate is beyond z standard errors with a probability of about
# erfc(z / sqrt 2); over V coordinates (Bonferroni) beyond 5 with a probability below 40 * 6e-7 = 2.3e-5.
Z = 5.0


def sampling_sigma(p: np.ndarray, q: np.ndarray, student: np.ndarray, draws: int) -> np.ndarray:
    """The exact standard deviation of each coordinate of an estimate's gradient.

    One draw x ~ q gives (p/q)(x) (P_S - onehot(x)); an estimate is the mean of `draws` of them.
    """
    one = (p / q)[:, None] * (softmax(student)[None] - np.eye(len(p)))  # [drawn, coordinate]
    mean = q @ one
    sigma: np.ndarray = np.sqrt((q @ one**2 - mean**2) / draws)
    return sigma


@mostly_thorough("proposal_temperature", [1.0, 1.5])
def test_the_sampled_gradient_is_unbiased(proposal_temperature: float) -> None:
    teacher, student = logits(), logits(seed=1)
    p, q = softmax(teacher), softmax(teacher / np.float32(proposal_temperature))
    config = EncodingConfig("sampled", 12, proposal_temperature=proposal_temperature, weight_bits=16)
    weights = dense(cached(config, teacher, R), V)
    gradients = gradient(student, weights)
    sigma = sampling_sigma(p, q, student, 12)
    common = p > 0.005  # drawn over a thousand times; and what is estimated varies as it should
    assert np.abs(gradients.std(0) / sigma - 1)[common].max() < 0.05
    assert largest_deviation(gradients, softmax(student) - p, sigma) < Z
    if proposal_temperature > 1:
        sums = weights.sum(-1)
        assert sums.std() > 0.05  # weights are not brought to 1 ...
        normalised = gradient(student, weights / sums[:, None])
        assert largest_deviation(normalised, softmax(student) - p, sigma) > Z  # ... which this test would see


@pytest.mark.parametrize("proposal_temperature", [pytest.param(1.0, marks=pytest.mark.thorough), 1.5])
def test_the_gradient_above_is_that_of_the_trainers_loss(proposal_temperature: float) -> None:
    config = EncodingConfig("sampled", 12, proposal_temperature=proposal_temperature, weight_bits=16)
    sparse, student = cached(config, logits(), 1), logits(seed=1)
    found = jax.grad(cached_loss)(jnp.asarray(student), sparse)
    np.testing.assert_allclose(found, gradient(student, dense(sparse, V))[0], atol=1e-6)


@pytest.mark.thorough
def test_the_value_from_draws_is_too_large_by_what_they_lack_of_the_entropy() -> None:
    """The loss of the teacher itself is not 0, and every other student has the same offset."""
    teacher, student = logits(), logits(seed=1)
    p = softmax(teacher)
    sparse = cached(EncodingConfig("sampled", 12), teacher, 2000)
    weights = np.exp(sparse.log_weights[0].astype(float))
    entropies = -np.sum(np.where(weights > 0, weights * sparse.log_weights[0], 0), axis=-1)
    lacking = -np.sum(p * np.log(p)) - entropies.mean()
    assert lacking > 0.3
    for values in (teacher, student):
        rows = jnp.broadcast_to(jnp.asarray(values), (2000, V))
        found = sparse_forward_kl(rows, jax.tree.map(lambda each: each[0], sparse), 1.0)
        kl = np.sum(p * np.log(p / softmax(values)))
        error = 4 * float(jnp.std(found)) / math.sqrt(2000)
        assert float(jnp.mean(found)) == pytest.approx(kl + lacking, abs=error)


def test_top_k_is_biased_and_the_test_sees_it() -> None:
    teacher, student = logits(), logits(seed=1)
    weights = dense(cached(EncodingConfig("top_k", 12), teacher, 2), V)
    expected = softmax(student) - softmax(teacher)
    sigma = sampling_sigma(softmax(teacher), softmax(teacher), student, 12)
    assert np.max(np.abs(gradient(student, weights).mean(0) - expected) / (sigma / math.sqrt(R))) > Z


def test_draws_follow_the_teacher() -> None:
    """Pearson's chi-square over all draws has V - 1 degrees of freedom: mean 39, beyond 39 + 5 sqrt(78) hardly ever."""
    teacher = logits()
    p = softmax(teacher)
    counts = dense(cached(EncodingConfig("sampled", 12), teacher, R), V).sum(0) * 12
    assert counts.sum() == pytest.approx(12 * R, rel=1e-6)
    expected = 12 * R * p
    assert np.sum((counts - expected) ** 2 / expected) < (V - 1) + 5 * math.sqrt(2 * (V - 1))


@pytest.mark.parametrize("scale", [0.0, 2.0, 10.0])
def test_what_is_drawn_from_is_the_softmax(scale: float) -> None:
    """The implied probability of every id, at a vocabulary where float32 sums over all of it would lose many."""
    size = 256_000
    values = logits(size, scale)
    runs = run_weights(jnp.asarray(values))
    outer = np.diff(np.asarray(cumulative(runs.sum(-1))).astype(float), prepend=0) / 2**31
    inner = np.diff(np.asarray(cumulative(runs)).astype(float), prepend=0) / 2**31
    implied = (outer[:, None] * inner).reshape(-1)
    assert np.all(implied[size:] == 0)
    assert 0.5 * np.abs(implied[:size] - softmax(values)).sum() < 2e-6
    plain = np.diff(np.asarray(jnp.cumsum(jax.nn.softmax(jnp.asarray(values)))).astype(float), prepend=0)
    if scale == 2.0:  # which is why: see what a single level gives
        assert 0.5 * np.abs(plain - softmax(values)).sum() > 1e-3


def test_padding_is_never_drawn_and_a_certain_token_always() -> None:
    values = np.full((1, 1000), -1e30, np.float32)
    values[0, 700] = 5.0
    made = encode(EncodingConfig(entries=500), jnp.asarray(values), 990, jnp.uint32(0), jnp.arange(1))
    assert np.all(np.asarray(made.ids) == 700)
    values[0, :5] = 4.0
    made = encode(EncodingConfig(entries=500), jnp.asarray(values), 990, jnp.uint32(0), jnp.arange(1))
    assert set(np.unique(made.ids)) == {0, 1, 2, 3, 4, 700}


@pytest.mark.parametrize("kind", ["sampled", "top_k", "top_p", "full"])
def test_a_teacher_with_nan_outputs_is_reported(kind: str) -> None:
    config = {
        "sampled": EncodingConfig(entries=5),
        "top_k": EncodingConfig("top_k", 5),
        "top_p": EncodingConfig("top_p", 5, p=0.9),
        "full": EncodingConfig("full", None),
    }[kind]
    values = logits().copy()
    cached(config, values, 3)
    values[7] = np.nan
    with pytest.raises(UserError, match=r"distill\.teacher gives NaN for some tokens"):
        cached(config, values, 3)


@pytest.mark.thorough
def test_draws_differ_from_row_to_row_and_place_to_place_and_seed_to_seed() -> None:
    flat = jnp.zeros((2, 2, 1000))
    rows, places = jnp.arange(2, dtype=jnp.uint32)[:, None], jnp.arange(2)
    made = [np.asarray(encode(EncodingConfig(seed=seed), flat, 1000, rows, places).ids) for seed in (0, 1)]
    assert len({token.tobytes() for ids in made for row in ids for token in row}) == 8
    alone = encode(EncodingConfig(), flat[:1, :1], 1000, jnp.uint32(1), jnp.arange(1, 2)).ids
    assert np.array_equal(alone[0, 0], made[0][1, 1])


def cached_loss(student: jax.Array, sparse: SparseTargets) -> jax.Array:
    """The trainer's forward KL to the first token."""
    return sparse_forward_kl(student, jax.tree.map(lambda values: values[0, 0], sparse), 1.0)


def renormalised_loss(student: jax.Array, sparse: SparseTargets) -> jax.Array:
    """The loss of trainers without a tail: both sides are renormalised over the k ids."""
    log_teacher = jax.nn.log_softmax(sparse.log_weights[0, 0])
    return jnp.sum(jnp.exp(log_teacher) * (log_teacher - jax.nn.log_softmax(student[sparse.ids[0, 0]])))


@pytest.mark.thorough
def test_the_tail_constrains_the_student_where_renormalising_does_not() -> None:
    teacher = logits()
    sparse = cached(EncodingConfig("top_k", 8, weight_bits=16), teacher, 1)
    outside = np.setdiff1d(np.arange(V), sparse.ids[0, 0])
    assert len(outside) == V - 8
    assert sparse.tail[0, 0] == pytest.approx(softmax(teacher)[outside].sum(), rel=3e-3)
    student = jnp.asarray(logits(seed=1)).at[outside].add(2.0)  # puts far too much there
    assert np.all(jax.grad(cached_loss)(student, sparse)[outside] > 1e-4)
    assert np.all(jax.grad(renormalised_loss)(student, sparse)[outside] == 0)
    # At the teacher's own logits nothing pulls: the tail is neither pushed down nor up.
    assert np.abs(jax.grad(cached_loss)(jnp.asarray(teacher), sparse)).max() < 1e-3


@pytest.mark.thorough
def test_where_the_entries_are_all_tokens_there_is_no_tail() -> None:
    """A confident teacher with a padded vocabulary: rounding of float32 sums below 1 is not tail probability."""
    size, config = V + 24, EncodingConfig("top_k", V)
    padded = np.concatenate([logits(scale=8.0), np.full(24, -1e30, np.float32)])
    student = jnp.concatenate([jnp.asarray(logits(seed=1)), jnp.full(24, -1e30)])
    made = encode(config, jnp.asarray(padded)[None], V, jnp.uint32(3), jnp.arange(1))
    packer = Packer(config, log_grid(config, MODEL), V, 1)
    packed = packer.pack(jax.tree.map(np.asarray, made), 0)
    sparse, _ = packer.unpack([packed.record], packed.largest)
    assert sparse.tail.tolist() == [[0.0]]
    weights = dense(sparse, size)
    found = jax.grad(cached_loss)(student, sparse)
    np.testing.assert_allclose(found, gradient(np.asarray(student), weights)[0], atol=1e-6)


def test_a_small_tail_is_that_of_the_other_tokens() -> None:
    """Far below the rounding error of 1 - sum(p) in float32."""
    teacher = np.full(V, -20.0, np.float32)
    teacher[:8] = np.linspace(4, 8, 8)
    expected = math.log(softmax(teacher)[8:].sum())
    made = encode(EncodingConfig("top_k", 8), jnp.asarray(teacher), V, jnp.uint32(3), jnp.int32(0))
    assert expected < -23
    assert float(made.log_tail) == pytest.approx(expected, abs=1e-4)


def test_top_p_keeps_the_fewest_ids_that_reach_p() -> None:
    teacher = logits()
    p = softmax(teacher)
    order = np.argsort(-p)
    needed = int(np.searchsorted(np.cumsum(p[order]), 0.7)) + 1
    for k, kept in ((30, needed), (needed - 2, needed - 2)):
        sparse = cached(EncodingConfig("top_p", k, p=0.7, weight_bits=16), teacher, 1)
        assert np.array_equal(np.sort(order[:kept]), sparse.ids[0, 0])
        assert sparse.tail[0, 0] == pytest.approx(p[order[kept:]].sum(), rel=3e-3)


def test_full_gives_the_dense_gradient() -> None:
    teacher, student = logits(), logits(seed=1)
    weights = dense(cached(EncodingConfig("full", None, weight_bits=16), teacher, 1), V)
    np.testing.assert_allclose(gradient(student, weights)[0], softmax(student) - softmax(teacher), atol=3e-4)


@pytest.mark.thorough
def test_the_temperature_softens_what_is_kept() -> None:
    teacher = logits()
    weights = dense(cached(EncodingConfig("full", None, temperature=3.0, weight_bits=16), teacher, 1), V)
    np.testing.assert_allclose(weights[0], softmax(teacher / np.float32(3.0)), atol=3e-4)
