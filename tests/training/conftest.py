"""Checkpoints that runs start from or learn from."""

from dataclasses import replace

import pytest

from gemma2_jax.run import RunConfig
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid


@pytest.fixture(scope="session")
def base(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the toy run's sizes."""
    return write_teacher(toy_run, vivid(toy_run.model), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def wide_teacher(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a wider model."""
    model = vivid(replace(toy_run.model, d_model=48))
    return write_teacher(toy_run, model, tmp_path_factory.mktemp("wide_teacher") / "teacher")
