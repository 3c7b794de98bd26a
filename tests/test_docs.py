"""README and docs: every command is one that the command line takes, every link leads somewhere, every example imports.

Nothing is trained: commands are parsed and their configurations composed, as far as that goes without data or weights.
"""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import gemma2_jax as g2
from gemma2_jax.chips import CHIPS
from gemma2_jax.cli import evaluate
from gemma2_jax.cli.compose import compose, compose_file
from gemma2_jax.cli.compose_sweep import compose_sweep
from gemma2_jax.cli.main import parse_arguments
from gemma2_jax.cli.roots import find_study
from gemma2_jax.cli.run import compose_study
from gemma2_jax.cli.student_options import compose_students
from gemma2_jax.config import load_config, save_config
from gemma2_jax.launching.job import check_config
from gemma2_jax.launching.settings import GkeSettings, SlurmSettings, TpuVmSettings
from gemma2_jax.methods.method import Method
from gemma2_jax.model.weights import abstract_params, init_params, weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.training.together import check_alike, check_together

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted((ROOT / "experiments").glob("*/README.md"))  # whose commands and links are checked too
OURS = {"gemma2", "pytest", "python", "pip"}
OTHERS = {
    "git",
    "cd",
    ".",
    "python3",
    "tensorboard",
    "trackio",
    "xprof",
    "jupyter",
    "gcloud",
    "ollama",
    "curl",
    "llama-server",
    "vllm",
    "adb",
    "litert-lm",
}  # their options are not checked


@dataclass(frozen=True)
class Command:
    """A command of a page, split as a shell would, without what follows `|` or `>`.

    Attributes:
        environment: the variables that it is given.
    """

    page: str
    line: int
    words: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """The commands of the indented blocks, continued lines joined; other indented lines are left out."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, fenced = 0, False
    while number < len(lines):
        begin, text = number + 1, lines[number]
        number += 1
        fenced ^= text.startswith("```")
        program = re.match(r"    (?:[A-Z_]+=\S* )*(\S+) ", f"{text} ")
        if fenced or program is None or program[1] not in OURS | OTHERS:
            continue
        while text.endswith("\\"):
            text = text[:-1] + lines[number]
            number += 1
        for words in split(text):
            environment: dict[str, str] = {}
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                environment[name] = value
            yield Command(page.relative_to(ROOT).as_posix(), begin, tuple(words), environment)


def split(text: str) -> Iterator[list[str]]:
    """The simple commands of a line, without redirections and comments."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token in ("&&", "|", ";"):
            yield words
            words = []
        elif token in ("<", ">", ">>"):
            next(tokens)
        else:
            words.append(token)
    yield words


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


COMMANDS = [command for page in [*PAGES, *STUDIES] for command in commands(page)]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(code_blocks(page, "python"))
]


def of(program: str) -> list[Any]:
    return [
        pytest.param(
            command, id=str(command), marks=[pytest.mark.thorough] if is_of_many_runs(command) else []
        )
        for command in COMMANDS
        if command.words[0] == program
    ]


def is_of_many_runs(command: Command) -> bool:
    """Whether a command composes dozens of configurations, which takes seconds."""
    words = command.words[1:]
    return words[:1] in (("run",), ("sweep",)) or "--sweep" in words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands expect in their directory: the files that pages give in full, and a run's configuration."""
    found = tmp_path_factory.mktemp("docs")
    for page in PAGES:
        for block in code_blocks(page, "yaml"):
            file = found / block.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.partition("\n")[2], encoding="utf-8")
    (found / "runs/student").mkdir(parents=True)
    save_config(compose(["name=student"]), found / "runs/student/config.yaml")
    return found


def test_there_are_commands() -> None:
    verbs = {command.words[1] for command in COMMANDS if command.words[0] == "gemma2"}
    assert verbs == {
        "run", "train", "train-together", "teacher-cache", "sweep", "plan", "launch", "generate", "convert", "inspect",
        "data", "tokenizer", "config", "merge", "eval", "report", "watch", "fit",
    }  # fmt: skip
    assert {command.words[0] for command in COMMANDS} == OURS | OTHERS


@pytest.mark.parametrize("command", of("gemma2"))
def test_a_command_is_accepted(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = parse_arguments(command.words[1:])
    assert "run" in arguments, "a verb is missing, or an action"
    check = CHECKS.get(" ".join(command.words[1:3])) or CHECKS.get(command.words[1])
    if check is not None:
        check(arguments)


def check_train(arguments: argparse.Namespace) -> None:
    if arguments.config:
        compose_file(arguments.config, arguments.overrides)
    else:
        compose(arguments.overrides, arguments.config_dir)


def check_overrides(arguments: argparse.Namespace) -> None:
    compose(arguments.overrides, arguments.config_dir)


def check_study(arguments: argparse.Namespace) -> None:
    study = load_config(StudyConfig, find_study(arguments.study, arguments.config_dir))
    compose_study(arguments.study, study, arguments.overrides, arguments.config_dir)


def check_students(arguments: argparse.Namespace) -> None:
    check_together(compose_students(arguments.overrides, arguments.student, arguments.config_dir))


def check_plan(arguments: argparse.Namespace) -> None:
    (topology,) = [text for text in arguments.overrides if text.startswith("topology=")]
    chip = topology.removeprefix("topology=").split(":")[0]
    assert chip == "cpu" or chip in CHIPS
    rest = [text for text in arguments.overrides if text != topology]
    if arguments.student:
        check_alike(compose_students(rest, arguments.student, arguments.config_dir))
    else:
        compose(rest, arguments.config_dir)


def check_ids(arguments: argparse.Namespace) -> None:
    compose([text for text in arguments.overrides if "=" in text], arguments.config_dir)


def check_launch(settings_class: Any) -> Any:
    def check(arguments: argparse.Namespace) -> None:
        settings = settings_class(
            **{field.name: getattr(arguments, field.name) for field in fields(settings_class)}
        )
        if getattr(arguments, "sweep", False):
            compose_sweep(arguments.overrides, arguments.config_dir)
            return
        config = compose(arguments.overrides, arguments.config_dir)
        check_config(config, getattr(settings, "slices", 1))

    return check


CHECKS: dict[str, Any] = {
    "train": check_train,
    "run": check_study,
    "train-together": check_students,
    "teacher-cache": check_overrides,
    "sweep": lambda arguments: compose_sweep(arguments.overrides, arguments.config_dir),
    "plan": check_plan,
    "eval": evaluate.settings,
    "launch slurm": check_launch(SlurmSettings),
    "launch tpu-vm": check_launch(TpuVmSettings),
    "launch gke": check_launch(GkeSettings),
    "data": check_overrides,
    "tokenizer": check_overrides,
    "tokenizer decode": check_ids,
    "config": lambda arguments: arguments.run(arguments),  # it shows, and does nothing else
}


@pytest.mark.parametrize("command", of("python"))
def test_a_script_exists(command: Command) -> None:
    assert (ROOT / command.words[1]).is_file()


@pytest.mark.parametrize("command", of("pip"))
def test_an_extra_exists(command: Command) -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) =$", setup.partition("[options.extras_require]")[2], re.MULTILINE)
    for word in command.words:
        for extra in re.findall(r"^\.\[(.*)\]$", word):
            assert set(extra.split(",")) <= set(extras)


@pytest.mark.parametrize("command", of("pytest"))
def test_what_pytest_is_given_exists(command: Command) -> None:
    words = iter(command.words[1:])
    for word in words:
        if word == "-m":
            marker = next(words)
            settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert f'"{marker}: ' in settings
        elif word == "-n":
            next(words)
        elif not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_too_long(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert page.name != "README.md" or page.parent != ROOT or len(lines) <= 200


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_each_link_leads_somewhere(page: Path) -> None:
    text = re.sub(
        r"^(```.*?^```$|    .*?$)", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else page.parent / path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_indexes() -> None:
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        text = index.read_text(encoding="utf-8")
        for page in PAGES[1:]:
            assert page.name == "README.md" or f"{page.name})" in text


@pytest.mark.parametrize("block", BLOCKS)
def test_what_an_example_imports_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma2_jax"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "g2":
            assert node.attr in g2.__all__
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "g2.compose":
            compose(ast.literal_eval(node.args[0]))


def test_the_api_page_has_every_name() -> None:
    text = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
    for name in g2.__all__:
        assert name == "__version__" or f"`g2.{name}" in text


@pytest.fixture(scope="module")
def defined() -> dict[str, Any]:
    """What the examples of the page on extensions define, each by its name."""
    found: dict[str, Any] = {}
    for block in code_blocks(ROOT / "docs" / "extending.md", "python"):
        if "def " in block:
            exec(block, found)
    return found


def taught(run: RunConfig) -> RunConfig:
    objective = replace(run.objective, cross_entropy=0.0, forward_kl=1.0)
    return replace(run, objective=objective, distill=replace(run.distill, teacher="given", model=run.model))


def test_the_examples_are_methods(defined: dict[str, Any], toy_run: RunConfig) -> None:
    run = taught(toy_run)
    members = [name for name in vars(Method) if not name.startswith("_")]
    mesh = build_mesh(toy_run.mesh, jax.devices()[:1])
    for method in (defined["TokenAfterNext"](toy_run), defined["TwoTeachers"](run, second="another")):
        assert [name for name in members if not hasattr(method, name)] == []
        trainable = {name: abstract_params(specs) for name, specs in method.specs.items()}
        frozen = method.abstract_frozen(mesh)
        batch, step = method.abstract_batch(mesh), jnp.int32(0)
        with jax.set_mesh(mesh):
            loss, sums = jax.eval_shape(method.loss, trainable, frozen, batch, step)
            validated = jax.eval_shape(method.evaluate, trainable, frozen, batch)
        assert loss.shape == ()
        assert {"loss", "targets", "cross_entropy"} <= sums.keys()
        assert {"targets", "cross_entropy"} <= validated.keys()


def paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_the_example_is_an_adaptation(defined: dict[str, Any], toy_run: RunConfig) -> None:
    adaptation, specs = defined["NormsOnly"](), weight_specs(toy_run.model)
    params = init_params(specs, jax.random.key(0))
    trained, frozen = adaptation.split(params, jax.random.key(1))
    assert paths(trained) == paths(adaptation.specs(specs)[0])
    assert paths(adaptation.join(trained, frozen)) == paths(params)
    assert 0 < len(jax.tree.leaves(trained)) < len(jax.tree.leaves(params))
    g2.build_method(toy_run, adaptation)


def test_the_example_is_a_loss(defined: dict[str, Any]) -> None:
    student, teacher = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, -2.0]])
    function = defined["total_variation"]
    np.testing.assert_allclose(function(student, student, 2.0), [0.0], atol=1e-6)
    S, T = np.exp(student) / np.exp(student).sum(), np.exp(teacher) / np.exp(teacher).sum()
    np.testing.assert_allclose(function(student, teacher, 1.0), [abs(S - T).sum() / 2], rtol=1e-5)


def test_the_example_is_a_kernel(defined: dict[str, Any]) -> None:
    from gemma2_jax.kernels.self_attention import AttentionConfig, self_attention

    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (2, 6, heads, 4)) for k, heads in zip(keys, (4, 2, 2), strict=True)
    )
    places = jnp.tile(jnp.arange(6), (2, 1)), jnp.ones((2, 6), jnp.int32)
    expected = self_attention(query, key, value, *places, 3, 50.0, AttentionConfig("reference"))
    np.testing.assert_allclose(
        defined["rowwise_attention"](query, key, value, *places, 3, 50.0), expected, rtol=1e-5
    )


def test_the_example_is_a_format(defined: dict[str, Any], toy_run: RunConfig, tmp_path: Path) -> None:
    from gemma2_jax.formats.layouts import HUGGINGFACE, expand
    from gemma2_jax.formats.source import all_places

    specs = weight_specs(toy_run.model)
    entries = expand(HUGGINGFACE, specs)
    arrays: dict[str, Any] = {name: np.ones(entry.shape, np.float32) for name, entry in entries.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    save_config(toy_run.model, tmp_path / "config.yaml")
    source = defined["NpzSource"](tmp_path)
    assert source.problems() == []
    for place in all_places(specs):
        assert (source.weight(place) == 1).all()


def test_the_example_is_an_engine(defined: dict[str, Any], tmp_path: Path) -> None:
    from gemma2_jax.launching.job import Job

    settings = defined["SshSettings"]("big", "/shared")
    submission = defined["submission"](settings, Job("mine-1", tmp_path / "mine-1"))
    assert "/shared/launches/mine-1/code" in submission.preview()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_names_its_file(page: Path) -> None:
    for block in code_blocks(page, "yaml"):
        assert re.fullmatch(r"# (my_configs|tasks)/[\w/]+\.yaml", block.splitlines()[0])
        assert isinstance(yaml.safe_load(block), dict)


def test_paths_in_the_text_exist() -> None:
    """Files of the checkout that pages name in backticks, but for names that stand for a user's own."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:gemma2_jax|tests|experiments|configs|constraints)/[\w./-]*)`", text):
            made_up = "NAME" in name or name == "configs/objective/total_variation.yaml"
            assert made_up or (ROOT / name).exists(), f"{page.name}: {name}"
