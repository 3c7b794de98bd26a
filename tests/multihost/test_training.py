"""A toy run by several processes: it is that of one process, and its checkpoints move between them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import restore_params
from gemma2_jax.config import load_config, save_config
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.processes.hosts import HostsConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train as train_here
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.together import train_together
from tests.multihost.job import GEMMA2, Ended, run_job

TIMES = ("tokens_per_second", "seconds", "mfu")


@pytest.fixture(scope="module")
def config(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run over all devices that there are, with weights and documents divided, saved for all processes."""
    folder = tmp_path_factory.mktemp("multihost")
    config = replace(
        toy_run,
        data=replace(toy_run.data, streams=2, shuffle_buffer=16),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        training=replace(toy_run.training, steps=4, eval_every=2, eval_batches=3),
        optimizer=replace(toy_run.optimizer, warmup_steps=1),
        checkpoint=replace(toy_run.checkpoint, every=2),
    )
    save_config(config, folder / "toy.yaml")
    return folder / "toy.yaml"


def train(config: Path, output: Path, processes: int, devices: int = 1, *overrides: str) -> list[Ended]:
    command = [*GEMMA2, "train", "--config", str(config), f"output={output}", *overrides]
    ended = run_job([command] * processes, devices)
    assert [process.code for process in ended] == [0] * processes, ended
    return ended


@pytest.fixture(scope="module")
def two(config: Path) -> tuple[Path, list[Ended]]:
    """The run's folder, and how its two processes ended."""
    folder = config.parent / "two"
    return folder, train(config, folder, 2)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The same by one process with two devices."""
    folder = config.parent / "alone"
    train(config, folder, 1, devices=2)
    return folder


def assert_same_metrics(folder: Path, other: Path) -> None:
    rows, others = read_metrics(folder), read_metrics(other)
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name in row.keys() - {"step", "split", *TIMES}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], row["split"], name)


def cut(folder: Path, target: Path) -> Path:
    """A copy of a run as if it had been stopped after step 2."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoints" / "4")
    return target


@pytest.mark.thorough
def test_two_processes_train_as_one(two: tuple[Path, list[Ended]], alone: Path) -> None:
    folder, _ = two
    assert_same_metrics(folder, alone)
    assert len(read_metrics(folder)) == 6  # four steps, two evaluations


@pytest.mark.thorough
def test_heads_that_are_split_over_processes(alone: Path, config: Path, tmp_path: Path) -> None:
    """Both hold all rows of a batch, and so both feed all of them."""
    train(config, tmp_path / "split", 2, 1, "mesh.fsdp=1", "mesh.tensor=2")
    assert_same_metrics(tmp_path / "split", alone)


@pytest.mark.thorough
def test_a_teacher_divided_over_two_processes(config: Path, alone: Path, tmp_path: Path) -> None:
    """Asked in each step about rows of one stream, which both pack (the default)."""
    distillation = ("objective.cross_entropy=0.2", "objective.forward_kl=0.8", f"distill.teacher={alone}")
    train(config, tmp_path / "two", 2, 1, *distillation, "data.streams=1", "training.steps=2")
    expected = load_config(RunConfig, tmp_path / "two" / "config.yaml")
    train_here(replace(expected, output=str(tmp_path / "here"), mesh=MeshConfig(1, 4, 2)))
    assert_same_metrics(tmp_path / "two", tmp_path / "here")
    assert all(row["kl"] > 0 for row in read_metrics(tmp_path / "two"))


@pytest.mark.slow
def test_two_students_of_a_teacher_and_a_baseline(config: Path, alone: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "experiments" / "toy.yaml"
    experiment.parent.mkdir()
    experiment.write_text("# @package _global_\n" + config.read_text())
    of_text = ["objective.cross_entropy=1.0", "objective.forward_kl=0.0", "distill.teacher=null"]
    students = ["--student", "one", "seed=1", "--student", "other", "seed=2", "--student", "text", *of_text]
    taught = ["objective.cross_entropy=0.0", "objective.forward_kl=1.0", f"distill.teacher={alone}"]
    # What is shared goes last, since run_job adds to it where the processes are.
    shared = ["--config-dir", str(tmp_path), "experiment=toy", f"output={tmp_path}/two", "training.steps=2"]
    command = [*GEMMA2, "train-together", *students, *shared, *taught]
    ended = run_job([command] * 2)
    assert [process.code for process in ended] == [0, 0], ended
    folders = [tmp_path / "two" / name for name in ("one", "other", "text")]
    found = [load_config(RunConfig, folder / "config.yaml") for folder in folders]
    train_together([replace(each, output=f"{each.output}-here", mesh=MeshConfig(1, 4, 2)) for each in found])
    for folder in folders:
        assert_same_metrics(folder, Path(f"{folder}-here"))
        assert all(("kl" in row) == (folder.name != "text") for row in read_metrics(folder))


@pytest.mark.thorough
def test_processes_that_see_different_weights(config: Path, alone: Path, tmp_path: Path) -> None:
    """Under one path, below the folders that they were started in."""
    for folder in ("first", "second"):
        shutil.copytree(alone, tmp_path / folder / "source")
    shutil.rmtree(tmp_path / "second" / "source" / "checkpoints" / "4")
    (tmp_path / "second" / "source" / "checkpoints" / "2").rename(
        tmp_path / "second" / "source" / "checkpoints" / "4"
    )
    command = [
        *GEMMA2,
        "train",
        "--config",
        str(config),
        f"output={tmp_path}/run",
        "initialise.source=source",
    ]
    ended = run_job([command] * 2, folders=[tmp_path / "first", tmp_path / "second"])
    assert [process.code for process in ended] == [1, 1]
    assert ended[0].errors.startswith("gemma2: process 1: the content of initialise.source source is ")
    assert ended[0].errors.endswith("must be started by the same command, and see the same files.\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_runs_that_save_at_the_same_time(tmp_path: Path) -> None:
    ended = run_job([[str(Path(__file__).parent / "saving.py"), str(tmp_path)]] * 2)
    assert [process.code for process in ended] == [0, 0], ended
    for run in ("one", "other"):
        assert sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) == ["11", "12"]


@pytest.mark.thorough
def test_two_processes_evaluate_as_one(alone: Path, tmp_path: Path) -> None:
    totals = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        command = [*GEMMA2, "eval", str(alone), "--teacher", str(alone), "--json", str(file), "mesh.fsdp=2"]
        ended = run_job([command] * processes, devices=2 // processes)
        assert [process.code for process in ended] == [0] * processes, ended
        assert [bool(process.output) for process in ended] == [True, False][:processes]
        record = json.loads(file.read_text())
        assert record["devices"].startswith("2 x")
        totals.append(record["rows"][0]["scores"]["packed"]["total"])
    one, two = totals
    assert one["tokens"] == two["tokens"] > 0
    assert two["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=1e-5)
    assert two["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.thorough
def test_only_process_0_prints(two: tuple[Path, list[Ended]]) -> None:
    folder, (first, second) = two
    assert first.output == f"{folder} is trained to step 4.\n"
    assert first.errors.count("validation cross-entropy") == 2
    assert (second.output, second.errors) == ("", "")


@pytest.mark.thorough
def test_a_run_folder_does_not_depend_on_its_processes(two: tuple[Path, list[Ended]]) -> None:
    assert load_config(RunConfig, two[0] / "config.yaml").hosts == HostsConfig()


@pytest.mark.thorough
def test_what_two_processes_saved_goes_on_in_one(
    two: tuple[Path, list[Ended]], config: Path, tmp_path: Path
) -> None:
    folder = cut(two[0], tmp_path / "run")
    (ended,) = train(config, folder, 1, devices=2)
    assert "resumes from its checkpoint at step 2" in ended.errors
    assert_same_metrics(folder, two[0])


@pytest.mark.thorough
def test_what_two_processes_saved_goes_on_in_four(
    two: tuple[Path, list[Ended]], config: Path, tmp_path: Path
) -> None:
    folder = cut(two[0], tmp_path / "run")
    first, *_ = train(config, folder, 4)
    assert "resumes from its checkpoint at step 2" in first.errors
    assert_same_metrics(folder, two[0])


def write_params(folder: Path, file: Path) -> Sequence[str]:
    """The weights of a run as one process reads them, in a file."""
    config = load_config(RunConfig, folder / "config.yaml")
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    leaves = jax.tree.leaves(
        restore_params(folder, abstract_params(weight_specs(config.model), "float32", mesh))
    )
    np.savez(file, *(np.asarray(leaf) for leaf in leaves))
    return [str(folder), str(file)]


@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.thorough), pytest.param(4, marks=pytest.mark.slow)]
)
def test_several_processes_read_the_bits_that_one_reads(
    two: tuple[Path, list[Ended]], tmp_path: Path, processes: int
) -> None:
    script = str(Path(__file__).parent / "compare.py")
    arguments = write_params(two[0], tmp_path / "params.npz")
    ended = run_job([[script, *arguments]] * processes)
    assert [process.code for process in ended] == [0] * processes, ended
