"""A step that a plan has compiled is not compiled again by the run."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma2_jax.compilation import use_compilation_cache
from gemma2_jax.config import UserError
from gemma2_jax.planning.program import compile_step
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train


@pytest.fixture(autouse=True)
def everything_is_kept() -> Iterator[None]:
    before = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def cache_folder() -> Any:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("jit_step_as_laid_out-")]


def test_a_run_takes_the_step_that_a_plan_has_compiled(toy_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    mine = cache_folder()
    config = replace(
        toy_run,
        output=str(tmp_path / "run"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        compilation_cache=str(folder),
    )
    compile_step(config, find_topology("cpu:8"))
    planned = steps_in(folder)
    assert len(planned) == 1
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    train(config)
    assert steps_in(folder) == planned  # under the same name there is the same program
    assert "/jax/compilation_cache/cache_hits" in hits
    assert len(list(folder.iterdir())) > 1  # of the run's other programs
    assert cache_folder() == mine


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("gs://bucket/folder", "which needs the package gcsfs"),
        ("ftp://host/folder", "accepted: a folder, or a bucket"),
    ],
)
def test_buckets_that_are_not_writable_are_reported(
    folder: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with (
        pytest.raises(UserError, match=f"compilation_cache is {folder}.*{message}"),
        use_compilation_cache(folder),
    ):
        pass


def test_a_path_that_cannot_be_a_folder_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(
            UserError,
            match=r"compilation_cache is .*file/cache, which cannot be used: .*file is a file, where a folder",
        ),
        use_compilation_cache(f"{file}/cache"),
    ):
        pass
