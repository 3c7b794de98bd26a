"""What all tests share: eight CPU devices, one compile cache, one tiny model."""

import os
import pathlib

# Before JAX is imported: it reads both once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def toy_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=97,
        num_layers=4,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        sliding_window=8,
        query_pre_attn_scalar=8,
    )


@pytest.fixture(scope="session")
def toy_model(toy_config: ModelConfig) -> Gemma2:
    return Gemma2.init(toy_config, jax.random.key(0))
