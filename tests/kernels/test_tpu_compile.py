"""A whole training step, compiled by the real TPU compiler for chips that are not there (extra `tpu`)."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from gemma2_jax.config import build, read_yaml
from gemma2_jax.kernels.self_attention import AttentionConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.state import Update
from gemma2_jax.training.step import build_train_step

MODELS = Path(__file__).parents[2] / "configs" / "model"
T = 8192

CASES = [
    ("gemma2_2b", "v5e:4x4", MeshConfig(data=1, fsdp=16), "full"),
    ("gemma2_9b", "v5e:4x4", MeshConfig(data=1, fsdp=4, sequence=2, tensor=2), "offload"),
    ("gemma2_27b", "v5p:2x2x1", MeshConfig(data=1, fsdp=1, tensor=4), "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "topology", "axes", "remat"), CASES)
def test_a_step_with_splash_compiles(size, topology, axes, remat, toy_run, monkeypatch):
    """Two layers of a released size; forward and backward kernels are there, and no array of all scores."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install -e '.[tpu]'")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = build_mesh(axes, devices)
    model = replace(build(ModelConfig, read_yaml(MODELS / f"{size}.yaml"), size), num_layers=2)
    config = replace(
        toy_run,
        model=model,
        mesh=axes,
        compute=ComputeConfig(dtype="bfloat16", remat=remat, attention=AttentionConfig("auto")),
        data=replace(toy_run.data, seq_len=T, batch_size=16),
        objective=replace(toy_run.objective, block_tokens=512),
    )
    method = build_method(config)
    update = Update(config, method.specs)
    abstract = update.abstract_state(mesh)
    with jax.set_mesh(mesh):
        step = build_train_step(method, update, abstract, config.layout)
        program = step.lower(abstract, method.abstract_frozen(mesh), method.abstract_batch(mesh)).compile()
    # With offload, the host's memory holds the inputs of both layers for a device's tokens; otherwise nothing.
    in_layer = 16 * T // (axes.fsdp * axes.sequence) * model.d_model * 2
    found: Any = program.memory_analysis()
    assert found.host_temp_size_in_bytes == (2 * in_layer if remat == "offload" else 0)
    text = program.as_text() or ""
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text
    assert not re.search(rf"\[(\d+,)*{T},{T}[\],]", text)
