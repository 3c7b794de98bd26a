"""Imports flow one way: a package imports only packages below it, and only the command line imports Hydra."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma2_jax"

BOTTOM = {
    "chips",
    "compilation",
    "config",
    "files",
    "machine",
    "messages",
    "schedule",
    "screen",
    "stops",
    "virtual_devices",
    "yaml_dialect",
}
# What each package may import besides itself and the bottom. A package that is not listed fails the test.
ALLOWED = {
    "chips": set(),
    "compilation": {"config", "machine"},
    "files": {"stops"},
    "machine": set(),
    "messages": set(),
    "screen": set(),
    "stops": set(),
    "virtual_devices": set(),
    "yaml_dialect": set(),
    "config": {"files", "messages", "yaml_dialect"},
    "schedule": {"config", "messages"},
    "model": {"kernels", "sharding"},
    "kernels": {"sharding"},
    "sharding": set(),
    "processes": set(),
    "data": {"sharding"},
    "objectives": {"model", "kernels", "sharding"},
    "checkpoints": {"model", "sharding", "processes"},
    "formats": {"model", "sharding", "data", "checkpoints"},
    "sampling": {"model", "kernels", "sharding", "data"},
    "distill": {
        "model",
        "kernels",
        "sharding",
        "processes",
        "data",
        "objectives",
        "sampling",
        "checkpoints",
        "formats",
    },
}
# `run` combines the configurations of the packages, so it is above them; everything that uses it is above `run`.
ALLOWED["run"] = set(ALLOWED) - BOTTOM - {"sampling", "formats"} | {"training"}
ALLOWED["methods"] = set(ALLOWED) - BOTTOM
ALLOWED["training"] = set(ALLOWED) - BOTTOM
ALLOWED["evaluation"] = ALLOWED["training"] | {"training"}
ALLOWED["studies"] = ALLOWED["evaluation"] | {"evaluation"}
ALLOWED["reports"] = ALLOWED["studies"] | {"studies"}
ALLOWED["planning"] = ALLOWED["training"] | {"training"} - {"distill"}  # it asks the method about teachers
ALLOWED["launching"] = {"run", "training"}
ALLOWED["__main__"] = {"cli"}
ALLOWED["cli"] = ALLOWED["studies"] | {"studies", "reports", "planning", "launching"}

# Libraries that only one package may import.
ONLY_IN = {
    "hydra": "cli",
    "omegaconf": "cli",
    "argparse": "cli",
    "orbax": "checkpoints",
    "matplotlib": "studies",
    "scipy": "studies",
    "safetensors": "formats",
    "gguf": "formats",
    "submitit": "launching",
    "optuna": "studies",
}


def imports(source: str) -> Iterator[str]:
    """Every module that a source text imports, at the top, inside functions, or for type checking."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "gemma2_jax":  # names a room by what it imports
                yield from (f"gemma2_jax.{name.name}" for name in node.names)
            else:
                yield str(node.module)


def violations(room: str, source: str) -> list[str]:
    """The imports of `source`, a file of `room`, that it should not have."""
    bad = []
    for module in imports(source):
        first, *rest = module.split(".")
        allowed = ALLOWED[room] | {room} | (BOTTOM if room not in BOTTOM else set())
        if (first == "gemma2_jax" and rest and rest[0] not in allowed) or ONLY_IN.get(first, room) != room:
            bad.append(module)
    return bad


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_imports_only_from_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(room, path.read_text(encoding="utf-8")) == []


def test_only_one_file_imports_hydra():
    knowing = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(
            module.split(".")[0] in ("hydra", "omegaconf")
            for module in imports(path.read_text(encoding="utf-8"))
        )
    }
    assert knowing == {"cli/compose.py", "cli/hydra_private.py"}


def test_training_asks_the_method_about_teachers():
    importing = {
        path.name
        for path in FILES
        if path.parent.name == "training"
        and any(module.startswith("gemma2_jax.distill.teacher") for module in imports(path.read_text()))
    }
    assert importing == {"teacher_cache.py"}


def test_only_one_file_imports_optuna():
    knowing = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(module.split(".")[0] == "optuna" for module in imports(path.read_text(encoding="utf-8")))
    }
    assert knowing == {"studies/samplers.py"}


def test_the_check_sees_what_it_should():
    assert violations("model", "from gemma2_jax.training.loop import train") == ["gemma2_jax.training.loop"]
    assert violations("studies", "def f():\n    from gemma2_jax import cli") == ["gemma2_jax.cli"]
    assert violations("training", "import hydra.utils") == ["hydra.utils"]
    assert violations("config", "import gemma2_jax.model") == ["gemma2_jax.model"]
    assert violations("model", "import jax\nfrom gemma2_jax.config import UserError") == []


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def test_what_is_imported_is_required_and_the_other_way_round():
    setup = read_setup()
    lines = setup["options"]["install_requires"]
    lines += "".join(
        setup["options.extras_require"][extra]
        for extra in (
            "parquet",
            "wandb",
            "trackio",
            "hub",
            "gguf",
            "litert",
            "cuda12",
            "slurm",
            "eval",
            "sweep",
        )
    )
    required = {re.split(r"[^A-Za-z0-9_.-]", line)[0].replace("-", "_") for line in lines.split("\n") if line}
    named_otherwise = {
        "absl": "absl_py",
        "yaml": "pyyaml",
        "hydra": "hydra_core",
        "orbax": "orbax_checkpoint",
    }
    first = {module.split(".")[0] for path in FILES for module in imports(path.read_text(encoding="utf-8"))}
    libraries = first - set(sys.stdlib_module_names) - {"gemma2_jax"}
    imported = {named_otherwise.get(name, name) for name in libraries}
    # SentencePiece's description of its model files is written for protobuf and does not require it.
    assert imported | {"protobuf"} == required


def test_every_room_is_packaged():
    setup = read_setup()
    found = (path.parent.relative_to(ROOT) for path in PACKAGE.glob("*/**/__init__.py"))
    rooms = {".".join(folder.parts) for folder in found}
    listed = set(setup["options"]["packages"].split())
    assert listed == {"gemma2_jax", "gemma2_jax.configs", "gemma2_jax.experiments", *rooms}
