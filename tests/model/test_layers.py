"""Each part against its formula in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels.softcap import softcap
from gemma2_jax.model.layers import MLP, Embedder, RMSNorm, rotate
from tests.model import numpy_gemma2 as formulas


def double(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_rms_norm(toy_config):
    x, scale = 3 * normal(0, 2, 5, 32), normal(1, 32)
    expected = formulas.rms_norm(double(x), double(scale), toy_config.norm_eps)
    np.testing.assert_allclose(RMSNorm({"scale": scale}, toy_config)(x), expected, rtol=2e-6, atol=1e-6)


def test_rms_norm_sums_in_float32(toy_config):
    """In bfloat16 the mean square of many ones and one 64 would lose the ones."""
    x = jnp.ones((1, 1, 4096), jnp.bfloat16).at[..., 0].set(64)
    normed = RMSNorm({"scale": jnp.zeros(4096)}, toy_config)(x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(double(normed[0, 0, 1]), (8191 / 4096) ** -0.5, rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rms_norm_widens_its_weights_before_it_adds_one(toy_config, dtype):
    x, scale = normal(0, 2, 5, 32), (0.01 * normal(1, 32)).astype(dtype)
    norm = RMSNorm({"scale": scale}, toy_config)
    expected = formulas.rms_norm(double(x), double(scale), toy_config.norm_eps)
    np.testing.assert_allclose(norm(x), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: norm(x))(x), norm(x), rtol=1e-6, atol=1e-6)


def test_geglu():
    x, gate, up, down = normal(0, 2, 3, 8), normal(1, 8, 16), normal(2, 8, 16), normal(3, 16, 8)
    x64, gate64, up64, down64 = (double(each) for each in (x, gate, up, down))
    expected = formulas.gelu_tanh(x64 @ gate64) * (x64 @ up64) @ down64
    mlp = MLP({"gate": gate, "up": up, "down": down})
    found = mlp.mix(mlp.neurons(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [[0, 1, 2], [5, 0, 8191]])
def test_rotary_embedding(positions):
    x = normal(0, 1, 3, 2, 8)
    expected = [
        [formulas.rotate(double(head), p, 10_000.0) for head in row]
        for row, p in zip(x[0], positions, strict=True)
    ]
    # float32 holds an angle of 8191 to 5e-4.
    np.testing.assert_allclose(rotate(x, jnp.array([positions]), 10_000.0)[0], expected, atol=2e-3)


def test_rotary_scores_depend_on_the_distance_only():
    query, key = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)
    at = [
        jnp.vdot(rotate(query, jnp.array([[p + 3]]), 10_000.0), rotate(key, jnp.array([[p]]), 10_000.0))
        for p in (0, 100)
    ]
    np.testing.assert_allclose(at[0], at[1], rtol=1e-4)


def test_rotary_angles_survive_bfloat16():
    x = normal(0, 1, 1, 1, 8)
    exact = rotate(x, jnp.array([[8191]]), 10_000.0)
    np.testing.assert_allclose(
        np.float32(rotate(x.astype(jnp.bfloat16), jnp.array([[8191]]), 10_000.0)), exact, atol=0.05
    )


def test_the_scale_of_queries_is_not_rounded_to_the_activations():
    """1/12, that of the 27B, is 0.2 % larger in bfloat16."""
    x = normal(0, 1, 1, 1, 512).astype(jnp.bfloat16)
    scaled = rotate(x, jnp.array([[0]]), 10_000.0, 144**-0.5)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled, (x.astype(jnp.float32) * 144**-0.5).astype(jnp.bfloat16))


def test_softcap():
    x = jnp.array([-1e6, -30.0, 0.0, 1e-3, 30.0, 1e6])
    np.testing.assert_allclose(softcap(x, 30.0), formulas.softcap(double(x), 30.0), rtol=1e-6)


def test_embedder(toy_config):
    table = normal(0, 97, 32)
    embedder = Embedder({"embedding": table}, toy_config)
    tokens = jnp.array([[3, 96]])
    np.testing.assert_allclose(embedder.encode(tokens, "float32"), table[tokens] * 32**0.5, rtol=1e-6)
    hidden = 10 * normal(1, 2, 32)
    expected = formulas.softcap(double(hidden) @ double(table).T, 30.0)
    np.testing.assert_allclose(embedder.decode(hidden), expected, rtol=1e-5, atol=1e-4)


def test_padding_of_the_vocabulary_has_probability_0(toy_config):
    table = normal(0, 97, 32).at[90:].multiply(100)  # without the mask, one of these would win
    hidden = normal(1, 20, 32)
    whole = Embedder({"embedding": table}, toy_config).decode(hidden)
    assert np.all(np.argmax(whole, axis=-1) >= 90)
    logits = Embedder({"embedding": table}, replace(toy_config, vocab_padding=7)).decode(hidden)
    np.testing.assert_array_equal(logits[:, :90], whole[:, :90])
    for temperature in (1e-3, 1.0, 1e3):
        assert np.all(np.isfinite(logits / temperature))
        assert not np.any(jax.nn.softmax(logits / temperature)[:, 90:])


def test_the_embedding_scale_is_rounded_to_the_activations(toy_config):
    """sqrt(32) is 5.657 and in bfloat16 5.65625; so trained, Gemma 2 needs it so."""
    embedded = Embedder({"embedding": jnp.ones((97, 32))}, toy_config).encode(jnp.array([[0]]), "bfloat16")
    assert embedded.dtype == jnp.bfloat16
    assert set(double(embedded).ravel()) == {5.65625}
    assert Embedder({"embedding": jnp.ones((97, 32))}, toy_config).decode(embedded).dtype == jnp.float32
