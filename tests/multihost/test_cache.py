"""A teacher's cache that two processes write and read, each its own rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.config import save_config, to_yaml
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.manifest import read_cache, verify_cache
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
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


LATE = [str(Path(__file__).parent / "late.py")]


def teacher_cache(
    run: RunConfig, folder: Path, programs: Sequence[list[str]], folders: Sequence[Path] | None = None
) -> list[Ended]:
    """How the processes that wrote `folder`, one for each of `programs`, have ended."""
    experiments = folder.with_suffix(".configs") / "experiments"
    experiments.mkdir(parents=True)
    (experiments / "toy.yaml").write_text(f"# @package _global_\n{to_yaml(run)}")
    asked = ["teacher-cache", "--config-dir", str(experiments.parent), "experiment=toy"]
    commands = [[*program, *asked, f"distill.cache={folder}"] for program in programs]
    return run_job(commands, devices=2 // len(programs), folders=folders)


@pytest.mark.thorough
def test_two_processes_write_and_read_what_one_does(run: RunConfig, tmp_path: Path) -> None:
    for programs in ([GEMMA2], [LATE, LATE]):
        processes = len(programs)
        cache = tmp_path / f"cache-{processes}"
        ended = teacher_cache(run, cache, programs)
        assert [process.code for process in ended] == [0] * processes, ended
        config = tmp_path / f"toy-{processes}.yaml"
        save_config(replace(run, distill=replace(run.distill, cache=str(cache))), config)
        train(config, tmp_path / f"run-{processes}", processes, 2 // processes)
    found = read_cache(tmp_path / "cache-2")
    assert [(file.process, file.rows) for file in found.files] == [(0, 4), (1, 4)]
    assert verify_cache(tmp_path / "cache-2") == 2
    assert_same_metrics(tmp_path / "run-2", tmp_path / "run-1")


@pytest.mark.thorough
def test_processes_that_see_different_teachers(run: RunConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_teacher(run, Gemma2.init(run.model, jax.random.key(seed)), folder / "teacher")
    elsewhere = replace(run, distill=replace(run.distill, teacher="teacher"))
    ended = teacher_cache(elsewhere, tmp_path / "cache", [GEMMA2, GEMMA2], folders)
    assert [process.code for process in ended] == [1, 1]
    assert "\ngemma2: process 1: the weights of distill.teacher teacher is " in ended[0].errors
    assert ended[0].errors.endswith("must be started by the same command, and see the same files.\n")
    assert ended[0].errors.count("\n") == 2  # what it was doing, and why it ended
    assert not (tmp_path / "cache").exists()
