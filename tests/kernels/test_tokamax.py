"""Arguments for tokamax: its XLA form against the reference, and the Hopper kernel, which is only compiled here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from gemma2_jax.chips import CHIPS
from gemma2_jax.config import UserError
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.self_attention import AttentionConfig, self_attention
from gemma2_jax.kernels.tokamax_attention import tokamax_attention
from gemma2_jax.planning.gpus import target_config
from gemma2_jax.sharding.layout import layout_in_use
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

pytest.importorskip("tokamax", reason="needs tokamax: pip install tokamax")

T = 40


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    B = 2
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 8))
    query, key, value = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(15), jnp.arange(25)]), (B, T))
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), jnp.array([15, 25])), (B, T))
    return 3 * query, key, value, positions, segments


@pytest.mark.parametrize("window", [None, 7])
def test_it_gets_the_soft_cap_the_window_and_the_segments(window):
    query, key, value, positions, segments = inputs()
    visible = visible_keys(positions, positions, segments, segments, window)
    weight = jax.random.normal(jax.random.key(1), query.shape)

    def found(query, key, value):
        arguments = positions, segments, window, 5.0, "xla"
        return jnp.sum(weight * tokamax_attention(query, key, value, *arguments))

    def expected(query, key, value):
        return jnp.sum(weight * attention(query, key, value, visible, 5.0))

    differentiate = partial(jax.value_and_grad, argnums=(0, 1, 2))
    (one, ones), (other, others) = (jax.jit(differentiate(f))(query, key, value) for f in (found, expected))
    for x, y in zip((one, *ones), (other, *others), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (jnp.float32, "computes in 16 bits, but compute.dtype is float32"),
        (jnp.bfloat16, "which fails: Not supported on cpu; choose auto or blockwise."),
    ],
)
def test_what_it_cannot_do_is_refused(dtype, says):
    query, key, value, positions, segments = inputs()
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    with pytest.raises(UserError) as error:
        tokamax_attention(query, key, value, positions, segments, None, 50.0)
    assert says in str(error.value)


def test_split_sequences_are_refused():
    with jax.set_mesh(build_mesh(MeshConfig(data=1, sequence=8))), pytest.raises(UserError) as error:
        tokamax_attention(*inputs(), None, 50.0)
    assert "mesh.sequence splits them over 8 devices" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize(("N", "K", "H"), [(8, 4, 256), (16, 8, 256), (32, 16, 128)])
def test_forward_and_backward_compile_for_an_h100(N, K, H, window, monkeypatch):
    """At 8,192 tokens of the released models' heads, under shard_map, and no array of all scores."""
    reason = "needs the CUDA compiler: pip install jax-cuda12-plugin jax-cuda12-pjrt"
    pytest.importorskip("jax_cuda12_plugin", reason=reason)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    gpus = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        target_config=target_config("h100", CHIPS["h100"]),
        topology="1x1x2",
    ).devices
    mesh = build_mesh(MeshConfig(data=1, tensor=2), gpus)

    def loss(query, key, value, positions, segments):
        config = AttentionConfig("tokamax")
        mixed = self_attention(query, key, value, positions, segments, window, 50.0, config)
        return jnp.sum(mixed.astype(jnp.float32))

    with jax.set_mesh(mesh), jax.default_device(gpus[0]):  # tokamax asks for the latter

        def shaped(dims, *shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=NamedSharding(mesh, layout_in_use().spec(dims))
            )

        heads = [shaped("BTNH", 1, 8192, heads, H) for heads in (N, K, K)]
        tokens = shaped("BT", 1, 8192, dtype=jnp.int32)
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*heads, tokens, tokens).compile()
    text = program.as_text() or ""
    assert "8192,8192" not in text
    assert text.count("mosaic_gpu") >= 3  # forward, dq, dkv
