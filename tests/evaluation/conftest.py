"""Two run folders with random weights and the prepared corpus as their data, without any training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.config import save_config
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from gemma2_jax.training.start import data_identity
from tests.model.models import vivid


@pytest.fixture(scope="session")
def write_toy_run(toy_run: RunConfig) -> Callable[[Path, Gemma2], str]:
    """Writes a model as a run on the prepared corpus, and returns its folder."""

    def write(folder: Path, model: Gemma2) -> str:
        write_run(folder, model.config, model.params(), Path(toy_run.tokenizer.path))
        config = replace(toy_run, output=str(folder), model=model.config)
        save_config(config, folder / "config.yaml")
        (folder / "data.json").write_text(json.dumps(data_identity(toy_run.data)))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def student(
    toy_run: RunConfig,
    write_toy_run: Callable[[Path, Gemma2], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    return write_toy_run(tmp_path_factory.mktemp("student") / "run", vivid(toy_run.model))


@pytest.fixture(scope="session")
def teacher(
    toy_run: RunConfig,
    write_toy_run: Callable[[Path, Gemma2], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    sizes = replace(toy_run.model, d_model=48)
    return write_toy_run(tmp_path_factory.mktemp("teacher") / "run", Gemma2.init(sizes, jax.random.key(5)))
