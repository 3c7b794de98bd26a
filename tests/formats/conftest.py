"""One small model as a run folder, and copies of it in other forms."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.config import ModelConfig
from tests.model.models import vivid


@pytest.fixture(scope="session")
def small(toy_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A model for the corpus's tokenizer; every size differs from every other."""
    return replace(toy_config, vocab_size=tokenizer.vocab_size, sliding_window=4096)


@pytest.fixture(scope="session")
def params(small):
    """Its weights in bfloat16, as released weights are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vivid(small).params())


@pytest.fixture(scope="session")
def run_folder(small, params, tokenizer_config, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "run"
    write_run(folder, small, params, Path(tokenizer_config.path))
    return folder


@pytest.fixture(scope="session")
def exported(run_folder) -> Path:
    """The run as a Hugging Face folder; for reading only."""
    folder = run_folder.parent / "exported"
    convert(run_folder, folder)
    return folder


@pytest.fixture
def hf_folder(exported, tmp_path) -> Path:
    """A Hugging Face folder that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))
