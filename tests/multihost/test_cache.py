"""A teacher's cache that two processes write and read, each its own rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.config import save, to_yaml
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.manifest import read_cache, verify_cache
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.config import RunConfig
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.multihost.job import GEMMA2, Ended, run_job
from tests.multihost.test_training import assert_same_metrics, train


@pytest.fixture(scope="module")
def run(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps of a student over two streams of the data, with shuffled rows."""
    folder = tmp_path_factory.mktemp("multihost-cache")
    return replace(
        toy_run,
        data=replace(toy_run.data, streams=2, shuffle_buffer=16),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        objective=ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(
            write_teacher(toy_run, vivid(toy_run.model), folder / "teacher"),
            "float32",
            cache=str(folder / "cache"),
            encoding=EncodingConfig("top_k", 8),
        ),
        training=replace(toy_run.training, steps=2, eval_every=2),
        optimizer=replace(toy_run.optimizer, warmup_steps=1),
        checkpoint=replace(toy_run.checkpoint, every=2),
    )


def teacher_cache(run: RunConfig, folder: Path, *own: tuple[str, ...]) -> list[Ended]:
    """How the processes, one for each of `own`, its part of the command, that wrote `folder` have ended."""
    experiments = folder.with_suffix(".configs") / "experiments"
    experiments.mkdir(parents=True)
    (experiments / "toy.yaml").write_text(f"# @package _global_\n{to_yaml(run)}")
    command = [*GEMMA2, "teacher-cache", "--config-dir", str(experiments.parent), "experiment=toy"]
    commands = [[*command, f"distill.cache={folder}", *overrides] for overrides in own]
    return run_job(commands, devices=2 // len(own))


def test_two_processes_write_and_read_what_one_does(run: RunConfig, tmp_path: Path) -> None:
    for processes in (1, 2):
        cache = tmp_path / f"cache-{processes}"
        ended = teacher_cache(run, cache, *[()] * processes)
        assert [process.code for process in ended] == [0] * processes, ended
        config = tmp_path / f"toy-{processes}.yaml"
        save(replace(run, distill=replace(run.distill, cache=str(cache))), config)
        train(config, tmp_path / f"run-{processes}", processes, 2 // processes)
    found = read_cache(tmp_path / "cache-2")
    assert [(file.process, file.rows) for file in found.files] == [(0, 4), (1, 4)]
    assert verify_cache(tmp_path / "cache-2") == 2
    assert_same_metrics(tmp_path / "run-2", tmp_path / "run-1")


def test_processes_that_would_write_different_caches(run: RunConfig, tmp_path: Path) -> None:
    ended = teacher_cache(run, tmp_path / "cache", (), ("distill.encoding.seed=1",))
    assert [process.code for process in ended] == [1, 1]
    told = "".join(process.errors for process in ended)
    assert "encoding.seed is 0 in process 0 and 1 in process 1" in told
    assert not list(tmp_path.glob("cache/signals*"))
