"""A built wheel carries configs and experiments, and works from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the unpacked wheel, as pip would lay it out."""
    pytest.importorskip("setuptools", reason="builds a wheel, which takes setuptools (in the extra dev)")
    folder = tmp_path_factory.mktemp("wheel")
    checkout, wheels, site = folder / "checkout", folder / "wheels", folder / "site"
    wheels.mkdir()
    for name in ("gemma2_jax", "configs", "experiments"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=checkout, check=True, capture_output=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def relative(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


def test_the_wheel_holds_every_module_and_config(installed):
    kinds = ("*.py", "*.jinja", "*.css", "*.js", "*.jsonl", "*.yaml")
    files = relative(ROOT / "gemma2_jax", *kinds)
    assert relative(installed / "gemma2_jax", *kinds) >= files
    for name, patterns in (("configs", ["*.yaml"]), ("experiments", ["*.yaml", "README.md"])):
        assert relative(installed / "gemma2_jax" / name, *patterns) == relative(ROOT / name, *patterns)
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"gemma2_jax"}


def test_the_wheel_composes_from_another_folder(installed, tmp_path):
    script = (
        "import gemma2_jax; from gemma2_jax.cli.compose import compose; from gemma2_jax.cli.roots import find_study;"
        "print(gemma2_jax.__file__, find_study('quickstart'), compose(['experiment=quickstart/distilled']).name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    module, study, name = done.stdout.split()
    assert module.startswith(str(installed))
    assert study == str(installed / "gemma2_jax" / "experiments" / "quickstart" / "study.yaml")
    assert name == "quickstart/distilled"
    assert list(tmp_path.iterdir()) == []
