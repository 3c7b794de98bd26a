"""Every kernel against the reference, in values and gradients; and what is refused."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.kernels.looped_attention import looped_attention
from gemma2_jax.kernels.self_attention import AttentionConfig, choose_kernel, device_in_use, self_attention
from gemma2_jax.kernels.tokamax_attention import suits
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.sharding.layout import LayoutConfig, constrain, laid_out
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.parameters import mostly_thorough
from tests.programs import arrays

# Sums of a few hundred float32 products, in another order, through exp: a few 1e-6 of values and gradients below 10.
TOLERANCE = 1e-4

Inputs = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, jax.Array
]  # query, key, value, positions, segment ids

REFERENCE = AttentionConfig("reference")
SPLASH = AttentionConfig("splash", block_queries=128, block_keys=128)

# T, H, window, soft cap, documents: soft caps that bite and one that does not, windows shorter than a block and longer,
# documents that end inside of blocks, lengths that no block divides, both head widths of Gemma 2 and an odd one.
CASES = [
    (256, 128, None, 5.0, [100, 156]),
    (300, 256, 100, 5.0, [120, 7, 173]),
    (200, 80, 1, 50.0, [200]),
]


def inputs(B: int, T: int, K: int, G: int, H: int, lengths: list[int]) -> Inputs:
    """Queries, keys, values, positions, segment ids; scores are several times larger than a soft cap of 5."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, K * G, H), (B, T, K, H), (B, T, K, H))
    query, key, value = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])
    segments = jnp.repeat(jnp.arange(1, len(lengths) + 1), jnp.array(lengths), total_repeat_length=T)
    positions, segments = (jnp.broadcast_to(x, (B, T)) for x in (positions, segments))
    return 8 * query * H**-0.5, key, value, positions, segments


def results(config: AttentionConfig, given: Inputs, window: int | None, softcap: float):
    """The output, and the gradients with respect to queries, keys and values."""
    weight = jax.random.normal(jax.random.key(1), given[0].shape)

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(query, key, value, positions, segments):
        query, key, value = constrain(query, "BTNH"), constrain(key, "BTKH"), constrain(value, "BTKH")
        output = self_attention(query, key, value, positions, segments, window, softcap, config)
        return jnp.sum(weight * output), output

    (_, output), gradients = jax.jit(loss)(*given)
    return jax.device_get((output, *gradients))


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


@mostly_thorough(("T", "H", "window", "softcap", "lengths"), CASES)
def test_splash_equals_the_reference(T, H, window, softcap, lengths):
    """The kernel in interpret mode, block by block."""
    given = inputs(2, T, 2, 2, H, lengths)
    expected = results(REFERENCE, given, window, softcap)
    assert_equal(results(SPLASH, given, window, softcap), expected)


def test_blocks_of_splash_may_be_longer_than_the_sequence():
    given = inputs(1, 150, 1, 2, 128, [150])
    config = AttentionConfig("splash", block_queries=512, block_keys=1024)
    assert_equal(results(config, given, None, 5.0), results(REFERENCE, given, None, 5.0))


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", ["splash", "blockwise"])
@pytest.mark.parametrize("window", [None, 100])
def test_devices_that_share_rows_heads_and_sequences(kernel, window):
    """Each has a part of the queries, all the keys that it may need, and sends their gradients back."""
    given = inputs(2, 512, 2, 2, 128, [200, 312])
    expected = results(REFERENCE, given, window, 5.0)
    config = AttentionConfig(kernel, block_queries=128, block_keys=256)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, sequence=2, tensor=2))):
        assert_equal(results(config, given, window, 5.0), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("window", [None, 1, 700])
@pytest.mark.parametrize("softcap", [5.0, 80.0])
def test_the_loop_of_long_sequences_equals_the_reference(window, softcap):
    """Over several blocks, the last of them not whole; a soft cap up to which exp needs no shift, and one beyond."""
    query, key, value, _, segments = given = inputs(1, 1100, 1, 2, 8, [300, 800])
    weight = jax.random.normal(jax.random.key(1), query.shape)

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(query, key, value):
        output = looped_attention(window, softcap, query, key, value, segments, segments, jnp.arange(1100))
        return jnp.sum(weight * output), output

    (_, output), gradients = jax.jit(loss)(query, key, value)
    assert_equal((output, *gradients), results(REFERENCE, given, window, softcap))


@pytest.mark.parametrize("kernel", ["splash", "blockwise"])
@pytest.mark.parametrize("T", [2048, pytest.param(32768, marks=pytest.mark.thorough)])
def test_no_kernel_builds_all_scores(kernel, T):
    """Neither way; nor does any array of a long sequence grow with its square."""
    B, K, G, H = 1, 1, 2, 128
    shapes = ((B, T, K * G, H), (B, T, K, H), (B, T, K, H), (B, T), (B, T))
    dtypes = (jnp.float32,) * 3 + (jnp.int32,) * 2
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def sizes(config: AttentionConfig) -> list[int]:
        def loss(query, key, value, positions, segments):
            return jnp.sum(self_attention(query, key, value, positions, segments, None, 50.0, config))

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*given)
        return [size for _, size in arrays(jaxpr.jaxpr)]

    block = 128 * T if T == 2048 else 512 * 512
    most = max(B * K * G * block, B * T * K * G * H)  # a block of scores of each head, or an input
    assert max(sizes(AttentionConfig(kernel))) <= most
    if T == 2048:
        assert max(sizes(REFERENCE)) >= B * K * G * T * T


def test_auto_takes_what_the_platform_has():
    auto = AttentionConfig()
    found = [choose_kernel(auto, platform) for platform in ("tpu", "gpu", "cpu")]
    assert found == ["splash", "blockwise", "blockwise"]
    assert choose_kernel(auto, "gpu", tokamax_suits=True) == "tokamax"
    assert choose_kernel(auto, "tpu", tokamax_suits=True) == "splash"


def test_tokamax_suits_the_released_models_on_hopper(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module)
    query = jnp.zeros((1, 8, 2, 256), jnp.bfloat16)
    assert suits(query, "NVIDIA H100 80GB HBM3")
    assert not suits(query, "NVIDIA A100-SXM4-80GB")
    assert not suits(query.astype(jnp.float32), "NVIDIA H100 80GB HBM3")
    assert not suits(query[..., :8], "NVIDIA H100 80GB HBM3")
    with jax.set_mesh(build_mesh(MeshConfig(data=1, sequence=8))):
        assert not suits(query, "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert not suits(query, "NVIDIA H100 80GB HBM3")


def test_the_platform_is_that_of_the_mesh():
    assert device_in_use() == ("cpu", "cpu")
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert device_in_use() == ("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("kernel", "made_for", "platform"),
    [("splash", "TPUs", "gpu"), ("tokamax", "GPUs", "tpu"), ("tokamax", "GPUs", "cpu")],
)
def test_a_kernel_for_another_platform_is_refused(kernel, made_for, platform):
    with pytest.raises(UserError) as error:
        choose_kernel(AttentionConfig(kernel), platform)
    assert str(error.value) == (
        f"compute.attention.kernel is {kernel}, which is for {made_for}, but this program is for a {platform}; choose "
        "auto or blockwise."
    )


@pytest.mark.parametrize("size", [0, 64, 200])
def test_blocks_that_no_tpu_can_hold_are_refused(size):
    with pytest.raises(UserError) as error:
        AttentionConfig(block_keys=size)
    assert str(error.value) == (
        f"compute.attention.block_keys is {size}; it must be a multiple of 128, and at least that."
    )


def test_heads_that_devices_do_not_share_alike_are_refused():
    given = inputs(8, 128, 2, 2, 128, [128])
    with jax.set_mesh(build_mesh(MeshConfig(data=1, tensor=8))), pytest.raises(UserError) as error:
        self_attention(*given, None, 5.0, SPLASH)
    assert "mesh.tensor is 8, which does not divide the 2 key/value heads of the model" in str(error.value)
    layout = LayoutConfig(activations={"B": ("data",), "N": ("tensor",)})
    mesh = build_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh), laid_out(layout), pytest.raises(UserError) as error:
        self_attention(*given, None, 5.0, SPLASH)
    assert "lays N along tensor and K along no axis" in str(error.value)


def test_configurations_without_the_key_still_load():
    old = {"dtype": "float32", "remat": "none", "unroll_layers": True}
    assert build(ComputeConfig, old, "config.yaml").attention == AttentionConfig()
