"""`gemma2 sweep`: sweeps described by sweep.yaml, their cost, and whole sweeps with several workers."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gemma2_jax.cli.compose_sweep import compose_sweep
from gemma2_jax.cli.main import main
from gemma2_jax.cli.roots import sweeps
from gemma2_jax.cli.sweep_groups import check_groups, estimated_bytes, with_groups
from gemma2_jax.config import UserError, save_config
from gemma2_jax.studies import stages, worker
from gemma2_jax.studies.space import SweepConfig
from gemma2_jax.studies.sweep import run_sweep
from gemma2_jax.studies.sweep_cost import describe_cost, sweep_cost
from gemma2_jax.studies.trials import Combination, Sweep
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid

HEAD = "experiment: quickstart/scratch\noverrides: [model=toy]\n"
SEED = "method: grid\nspace: {seed: [0]}\n"


@pytest.fixture
def described(tmp_path, monkeypatch):
    """Writes a sweep.yaml and returns its folder of configurations."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        file = tmp_path / "mine" / "experiments" / "tuned" / "sweep.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(HEAD + text)
        return str(tmp_path / "mine")

    return write


def runs_of(sweep):
    return [run for trial in sweep.trials for run in trial]


@pytest.mark.thorough
def test_every_sweep_composes():
    assert "learning_rate" in sweeps()
    for name in sweeps():
        assert compose_sweep([name]).output == f"runs/sweeps/{name}"


def test_a_grid_in_a_file_with_seeds(described):
    place = described(
        "method: grid\nspace: {optimizer.learning_rate: [1e-3, 0.01], optimizer.beta2: [0.99]}\nseeds: [3, 4]\n"
    )
    sweep = compose_sweep(["tuned", "training.steps=99"], place)
    found = runs_of(sweep)
    assert [run.key for run in found] == [
        f"optimizer.learning_rate={rate},optimizer.beta2=0.99,seed={seed}"
        for rate in ("0.001", "0.01")
        for seed in (3, 4)
    ]
    assert [(run.config.seed, run.config.data.seed) for run in found] == [(3, 3), (4, 4)] * 2
    assert {run.config.training.steps for run in found} == {99}
    assert found[0].config.output == f"runs/sweeps/tuned/{found[0].key}"
    assert {run.config.data for run in found[:2]} != {run.config.data for run in found[1:2]}
    assert found[0].config.data == found[2].config.data  # the same order for each arm


def test_named_trials(described):
    place = described(
        "method: list\nruns:\n  wide: [model.d_model=64]\n  deep: [model.num_layers=4, seed=3]\n"
    )
    wide, deep = runs_of(compose_sweep(["tuned", "output=out"], place))
    assert (wide.values, wide.config.name, wide.config.output) == ({"run": "wide"}, "wide", "out/wide")
    assert (wide.config.model.d_model, deep.config.model.num_layers, deep.config.seed) == (64, 4, 3)


def test_random_trials_are_numbered(described):
    place = described("method: random\ntrials: 3\nspace: {optimizer.beta1: {uniform: [0.1, 0.9]}}\n")
    found = runs_of(compose_sweep(["tuned"], place))
    assert [run.key.split(",")[0] for run in found] == ["000", "001", "002"]
    assert [f"{run.config.optimizer.beta1}" for run in found] == [
        run.values["optimizer.beta1"] for run in found
    ]


def test_long_names_are_cut_and_stay_different(described):
    runs = "".join(f"  {'x' * 230}{number}: [seed={number}]\n" for number in range(2))
    found = runs_of(compose_sweep(["tuned"], described(f"method: list\nruns:\n{runs}")))
    assert len({run.config.output for run in found}) == 2
    assert max(len(run.key) for run in found) < 200


@pytest.mark.parametrize(
    ("text", "arguments", "sentence"),
    [
        (
            "method: grid\nspace: {seed: [0, x]}\n",
            ["tuned"],
            "1 of 2 combinations are invalid, so no run was",
        ),
        (
            "method: random\ntrials: 1\nspace: {model.num_heads: {int: [1, 4]}, optimizer.beta1: {uniform: [0, 2]}}\n",
            ["tuned"],
            "combinations are invalid, so no run was started:",  # at the corners
        ),
        (SEED + "rungs: [400]\n", ["tuned"], "rungs has step 400, but training.steps is 360"),
        (SEED + "rungs: [60]\n", ["tuned"], "is evaluated only every 120 steps; set training.eval_every"),
        (SEED + "metric: kl\n", ["tuned"], "metric is kl, but seed=0 has no distill.teacher"),
        (
            "method: grid\nspace: {training.steps: [360, 480]}\nrungs: [120]\n",
            ["tuned"],
            "training.steps is 360 in one trial and 480 in another",
        ),
        (SEED, ["tuned", "seed=3"], "seed=3 has no effect, since sweep.yaml lists the values of"),
        (
            "method: grid\nspace: {optimizer.beta2: [0.99]}\nseeds: [1]\n",
            ["tuned", "data.seed=3"],
            "data.seed=3 has no effect, since",
        ),
        (SEED, ["tuned", "data.seed=3,4"], "data.seed= lists several values, but tuned has"),
        (SEED, ["tuned", "name=a"], "name= has no effect, since a sweep names each run"),
        (SEED, ["tuned", "other"], "tuned and other both name a sweep"),
        (SEED, ["tund"], "there is no sweep tund, did you mean tuned"),
        ("method: gird\nspace: {seed: [0]}\n", ["tuned"], "sweep.yaml: method is gird; did you mean grid"),
        ("method: grid\nspaces: {seed: [0]}\n", ["tuned"], "there is no key spaces, did you mean space"),
    ],
)
def test_a_wrong_sweep_is_reported_before_anything_is_trained(described, text, arguments, sentence):
    with pytest.raises(UserError) as caught:
        compose_sweep(arguments, described(text))
    assert sentence in str(caught.value)


def test_a_missing_extra_is_one_sentence(described, monkeypatch, capsys):
    monkeypatch.setattr("gemma2_jax.studies.samplers.is_installed", lambda module: False)
    place = described("method: tpe\ntrials: 3\nspace: {optimizer.beta1: {uniform: [0.1, 0.9]}}\n")
    assert main(["sweep", "tuned", "--config-dir", place]) == 1
    assert capsys.readouterr().err.startswith("gemma2: method is tpe, which needs Optuna: pip install -e")


def test_the_cost_is_shown_before_anything_is_trained(described, capsys):
    place = described("method: grid\nspace: {seed: {range: [0, 9]}}\nrungs: [120]\nseeds: []\n")
    assert main(["sweep", "tuned", "--config-dir", place, "--dry-run"]) == 0
    tokens = (9 * 120 + 3 * 240) * 8 * 128
    assert capsys.readouterr().out.splitlines() == [
        *(f"seed={seed}" for seed in range(9)),
        "in runs/sweeps/tuned",
        f"9 runs, {tokens:,} tokens (56% of those without rungs); the time will be estimated from the first run that "
        "is done.",
    ]
    assert not Path("runs").exists()
    assert main(["sweep", "tuned", "--config-dir", place, "--workers", "0"]) == 1


def test_the_time_is_estimated_from_an_earlier_run(described):
    place = described("method: grid\nspace: {seed: [0, 1]}\n")
    sweep = compose_sweep(["tuned"], place)
    assert sweep_cost(sweep).tokens == 2 * 360 * 8 * 128
    assert sweep.earlier == "runs/quickstart/scratch"
    earlier = Path(sweep.earlier)
    earlier.mkdir(parents=True)
    (run, *_) = runs_of(sweep)
    save_config(run.config, earlier / "config.yaml")
    (earlier / "metrics.jsonl").write_text('{"step": 1, "split": "train", "tokens_per_second": 1024.0}\n')
    assert describe_cost(sweep, 2) == (
        "2 runs, 737,280 tokens, about 6 min 00 s of training with 2 workers, at the speed of runs/quickstart/scratch."
    )


@pytest.mark.thorough
def test_killed_workers_leave_the_same_best_trial(described, data, tokenizer_config, tmp_path):
    """Of two sweeps, one has a single worker, and one has a worker that is killed, and two that end it."""
    place = described(
        "method: grid\nspace: {optimizer.learning_rate: [1e-4, 3e-2, 3e-3]}\nrungs: [2, 4]\nreduction: 2\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    keys = [
        *(
            "model=toy",
            "mesh.data=1",
            "data=files",
            f"data.source={data.source}",
            f"data.folder={data.folder}",
        ),
        *("data.batch_size=4", "data.seq_len=16", "data.workers=1", "data.validation_fraction=0.2"),
        f"data.shard_characters={data.shard_characters}",
        *("tokenizer.vocab_size=400", f"tokenizer.path={tokenizer_config.path}", "training.steps=8"),
        *("training.eval_every=2", "training.log_every=1", "training.eval_batches=1", "checkpoint.every=2"),
        *("optimizer.warmup_steps=1", "metrics.tensorboard=false"),
    ]

    def start(output: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "gemma2_jax.cli.main", "sweep", "tuned", "--config-dir", place]
        command += [*keys, f"output={output}", *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    alone, worker = start("whole"), start("killed")
    journal = tmp_path / "killed" / "journal.jsonl"
    while worker.poll() is None and not (journal.exists() and '"value"' in journal.read_text()):
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    last = start("killed", "--workers", "2")
    for process in (last, alone):
        error = process.communicate()[1]
        assert process.returncode == 0, error
    expected, found = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    for result in (*expected, *found):
        result.pop("seconds", None)
    assert found == expected
    assert [result.get("stopped") for result in found] == [None, 2, 2]


@pytest.fixture
def students(described, toy_run, tmp_path):
    """A sweep of three students of one teacher, and one on text alone."""
    teacher = write_teacher(toy_run, vivid(replace(toy_run.model, num_layers=4)), tmp_path / "teacher")
    taught = replace(
        toy_run,
        objective=replace(toy_run.objective, cross_entropy=0.0, forward_kl=1.0),
        distill=replace(toy_run.distill, teacher=teacher),
        training=replace(toy_run.training, steps=4, eval_every=4),
    )
    rates = ("0.01", "0.003", "0.001")
    configs = [
        replace(taught, optimizer=replace(taught.optimizer, learning_rate=float(rate)), name=rate)
        for rate in rates
    ]
    configs.append(replace(taught, training=replace(taught.training, steps=6), name="longer"))
    trials = [
        [Combination({"run": config.name}, replace(config, output=str(tmp_path / "out" / config.name)))]
        for config in configs
    ]
    settings = SweepConfig("list", runs={f"r{number}": () for number in range(4)})
    return Sweep(settings, str(tmp_path / "out"), trials, lambda number, point: trials[number])


@pytest.mark.usefixtures("one_device")
@pytest.mark.thorough
def test_groups_share_data_and_teacher_and_fit_the_memory(students):
    assert with_groups(students).groups == [["0.01", "0.003", "0.001"], ["longer"]]
    configs = [run.config for run in runs_of(students)]
    one, two = estimated_bytes(configs[:1]), estimated_bytes(configs[:2])
    assert one < two < 2 * one  # the teacher is there once
    assert with_groups(students, capacity=two).groups == [["0.01", "0.003"], ["0.001"], ["longer"]]
    assert with_groups(students, capacity=1).groups == [["0.01"], ["0.003"], ["0.001"], ["longer"]]


def test_what_cannot_be_trained_together_is_refused(described):
    place = described("method: grid\nspace: {seed: [0, 1]}\nrungs: [120]\n")
    with pytest.raises(
        UserError, match=r"^--together trains all runs .* but this sweep stops at rungs; leave it out"
    ):
        check_groups(compose_sweep(["tuned"], place))
    with pytest.raises(
        UserError, match=r"^--together shares a teacher's forward pass, but no run has distill.teach"
    ):
        check_groups(compose_sweep(["seed=1,2"]))


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_a_group_is_trained_in_one_program(students, monkeypatch):
    grouped, alone = [], []
    together, train = worker.train_together, stages.train

    def train_group(runs):
        grouped.append([run.name for run in runs])
        together(runs)

    def train_alone(run, until):
        alone.append(run.name)
        train(run, until=until)

    monkeypatch.setattr(worker, "train_together", train_group)
    monkeypatch.setattr(stages, "train", train_alone)
    monkeypatch.setattr(worker, "prepare_all", lambda configs, console: None)
    assert run_sweep(with_groups(students), Console(quiet=True))
    assert (grouped, alone) == ([["0.01", "0.003", "0.001"]], ["longer"])
    assert len(json.loads(Path(students.output, "results.json").read_text())) == 4
