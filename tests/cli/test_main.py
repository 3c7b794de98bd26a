"""The whole command line: fast help, exit codes, errors of one sentence."""

import json
import os
import platform
import signal
import subprocess
import sys
from importlib.metadata import version

import jax
import pytest
import yaml

import gemma2_jax
from gemma2_jax.cli import main as cli
from gemma2_jax.cli import train as train_verb
from gemma2_jax.cli.compose import compose, compose_file
from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError, build, save_config
from gemma2_jax.run import RunConfig

COMMANDS = [
    [],
    ["run"],
    ["train"],
    ["sweep"],
    ["report"],
    ["watch"],
    ["fit"],
    ["plan"],
    ["launch"],
    ["launch", "slurm"],
    ["launch", "tpu-vm"],
    ["launch", "gke"],
    ["generate"],
    ["data"],
    ["data", "prepare"],
    ["data", "show"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["tokenizer", "show"],
    ["tokenizer", "encode"],
    ["tokenizer", "decode"],
    ["config"],
    ["config", "show"],
    ["config", "list"],
    ["config", "explain"],
]

ASK_ALL = """
import contextlib, io, json, sys
from gemma2_jax.cli.main import main
helps = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    helps.append(getattr(output, "getvalue", str)())
print(json.dumps([helps, sorted({name.split(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def helps():
    """The output of every --help, and the libraries that a process has imported after printing all of them."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, json.dumps(COMMANDS)], capture_output=True, check=True
    )
    return json.loads(done.stdout)


def test_help_loads_nothing_heavy(helps):
    loaded = set(helps[1])
    assert "argparse" in loaded
    heavy = {
        "jax",
        "flax",
        "hydra",
        "omegaconf",
        "numpy",
        "pydantic",
        "yaml",
        "rich",
        "matplotlib",
        "grain",
        "orbax",
    }
    assert loaded & heavy == set()


def test_every_help_text_has_a_description_and_an_example(helps):
    for command, text in zip(COMMANDS, helps[0], strict=True):
        assert text.startswith("usage: gemma2 " + " ".join(command)), command
        assert text.count(f"  gemma2 {' '.join(command)}") >= 1, command
        assert all(len(line) <= 120 for line in text.splitlines()), command


@pytest.mark.parametrize(
    "command",
    [
        ["trian"],
        ["run"],
        ["data", "shwo"],
        ["config", "list", "model", "x"],
        ["generate"],
        ["train", "--confg", "x"],
    ],
)
def test_a_wrong_command_line_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "usage: gemma2" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["data"], ["config"], ["tokenizer"], ["launch"]])
def test_without_a_verb_or_action_the_help_is_printed(command, helps, capsys):
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == helps[0][COMMANDS.index(command)].split()
    assert captured.err == ""


def test_the_module_is_the_same_program_and_prints_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "gemma2_jax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"gemma2_jax {gemma2_jax.__version__} (Python {platform.python_version()}, JAX {version('jax')})\n"
    )
    refused = subprocess.run([sys.executable, "-m", "gemma2_jax", "trian"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.startswith("usage: gemma2 ")) == (2, True)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--steps", "5"], "training.steps=5"),
        (["--training.steps=5"], "training.steps=5"),
        (["--learning-rate", "1e-3"], "optimizer.learning_rate=1e-3"),
        (["model=toy", "--batch_size", "8"], "data.batch_size=8"),
        (["--seed"], "seed=…"),
    ],
)
def test_an_option_that_is_a_key_is_explained(given, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *given])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f" (did you mean {meant}?)\n")


@pytest.mark.parametrize("command", [["train", "--xyz"], ["inspect", "runs/x", "--steps", "5"]])
def test_an_option_that_is_like_no_key_is_only_refused(command, capsys):
    with pytest.raises(SystemExit):
        main(command)
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=str,
)
def test_a_terminal_that_lacks_letters_gets_them_spelt(environment):
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL.replace("io.StringIO()", "sys.stdout"), json.dumps(COMMANDS)],
        capture_output=True,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"experiment=..." in done.stdout
    assert b"_ is a space" in done.stdout


@pytest.mark.thorough
def test_a_configuration_in_a_file_is_utf_8_whatever_the_locale(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "gemma2_jax", "config", "show", "name=é"]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    (tmp_path / "config.yaml").write_bytes(done.stdout)
    assert compose_file(tmp_path / "config.yaml").name == "é"


def test_a_user_error_is_one_line_and_exits_with_1(capsys):
    assert main(["config", "show", "model=gemm2_2b"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gemma2: there is no model gemm2_2b, did you mean gemma2_2b")
    assert captured.err.count("\n") == 1


def test_config_show_prints_what_train_would_take(capsys):
    assert main(["config", "show", "experiment=quickstart/teacher", "--config-dir", ".", "seed=4"]) == 0
    shown = build(RunConfig, yaml.safe_load(capsys.readouterr().out), "shown")
    assert shown == compose(["experiment=quickstart/teacher", "seed=4"])


def test_config_list(capsys):
    assert main(["config", "list"]) == 0
    listed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "gemma2_27b" in listed["model"].split()
    assert "quickstart/distilled" in listed["experiment"].split()
    assert "quickstart" in listed["study"].split()
    assert main(["config", "list", "optimizer"]) == 0
    assert capsys.readouterr().out.split() == ["constant", "cosine", "muon", "wsd"]
    assert main(["config", "list", "optimiser"]) == 1
    assert "did you mean optimizer" in capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `gemma2 train` would have prepared and trained."""
    calls: list[RunConfig] = []
    monkeypatch.setattr("gemma2_jax.data.prepare.prepare", lambda data, tokenizer: None)
    monkeypatch.setattr("gemma2_jax.training.loop.train", calls.append)
    return calls


def test_train_takes_overrides_before_and_after_options(trained, tmp_path):
    assert main(["train", "model=toy", "--config-dir", str(tmp_path), "seed=3"]) == 0
    assert trained == [compose(["model=toy", "seed=3"])]


def test_train_repeats_a_run_from_its_file(trained, tmp_path):
    config = compose(["model=toy", "output=runs/there"])
    save_config(config, tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    assert trained == [config]


@pytest.mark.parametrize(("resumes", "hint"), [(True, "the same command resumes"), (False, "stopped.")])
def test_an_interrupt_exits_with_130_and_a_hint_how_to_resume(monkeypatch, capsys, resumes, hint):
    def interrupted(arguments):
        raise KeyboardInterrupt

    if resumes:
        monkeypatch.setattr(train_verb, "run", interrupted)
        command = ["train"]
    else:
        monkeypatch.setattr(cli.config, "show", interrupted)
        command = ["config", "show"]
    assert main(command) == 130
    message = capsys.readouterr().err
    assert hint in message
    assert "Traceback" not in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_and_exits_with_its_number(monkeypatch, capsys, number):
    unwound = []

    def killed(arguments):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a second one does not cut the way out short
            unwound.append(True)

    monkeypatch.setattr(train_verb, "run", killed)
    assert main(["train"]) == 128 + number
    assert unwound == [True]
    assert "the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "the memory of this machine is too small; choose smaller sizes,"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: ..."),
            "the memory of a device is too small (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); choose",
        ),
    ],
)
def test_too_little_memory_is_one_sentence(trained, monkeypatch, capsys, error, expected):
    def fails(arguments):
        raise error

    monkeypatch.setattr(train_verb, "run", fails)
    assert main(["train"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"gemma2: {expected}")
    assert message.count("\n") == 1


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under nohup."""
    monkeypatch.setattr(train_verb, "run", lambda arguments: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["train"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(train_verb, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_every_user_error_of_a_verb_is_reported(monkeypatch, capsys):
    def refused(arguments):
        raise UserError("no.")

    monkeypatch.setattr(train_verb, "run", refused)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "gemma2: no.\n"


def test_what_libraries_log_is_not_shown(tmp_path):
    """Whichever logger they take, and in whichever phase."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, sys\n"
        "from absl import logging as absl_logging\n"
        "from gemma2_jax.cli import data\n"
        "from gemma2_jax.cli.main import main\n"
        "def prepare(arguments):\n"
        "    absl_logging.warning('a log line')\n"
        "    absl_logging.error('a log line')\n"
        "    for name in ('orbax', 'jax._src.xla_bridge', 'unknown'):\n"
        "        logging.getLogger(name).error('a log line')\n"
        "    logging.warning('a log line')\n"
        "    print('done')\n"
        "data.prepare = prepare\n"
        "sys.exit(main(['data', 'prepare']))\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
