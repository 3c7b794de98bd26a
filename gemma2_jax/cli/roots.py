"""Locates configs and experiments: in a checkout, in an installed wheel, or in a user's folder."""

import os
from pathlib import Path

import gemma2_jax
from gemma2_jax.config import UserError, suggest

EXPERIMENTS = "experiments"


def config_roots(config_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Returns the folders that hold groups (model/, data/, …), the user's first."""
    return [*_own(config_dir), _home() / "configs"]


def experiment_roots(config_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Returns the folders that hold an `experiments` folder, the user's first."""
    return [*_own(config_dir), _home()]


def choices(group: str, config_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Returns the names that `group=` accepts, sorted; `experiment` is a group like the others."""
    if group == "experiment":
        folders = [root / EXPERIMENTS for root in experiment_roots(config_dir)]
    else:
        folders = [root / group for root in config_roots(config_dir)]
    names = {
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in folders
        for file in folder.rglob("*.yaml")
    }
    return sorted(name for name in names if Path(name).name not in ("study", "sweep"))


def studies(config_dir: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Returns the study.yaml of each study, by name; the user's studies take precedence over ours."""
    return _folders_with("study.yaml", config_dir)


def find_study(name: str, config_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the study.yaml of the study `name`. Raises UserError if there is none."""
    known = studies(config_dir)
    if name not in known:
        raise UserError(f"there is no study {name}, {suggest(name, known)}.")
    return known[name]


def sweeps(config_dir: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Returns the sweep.yaml of each sweep, by name; the user's sweeps take precedence over ours."""
    return _folders_with("sweep.yaml", config_dir)


def find_sweep(name: str, config_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the sweep.yaml of the sweep `name`. Raises UserError if there is none."""
    known = sweeps(config_dir)
    if name not in known:
        raise UserError(f"there is no sweep {name}, {suggest(name, known)}.")
    return known[name]


def _folders_with(file: str, config_dir: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Returns the files of that name in folders of experiments, by the names of their folders."""
    found: dict[str, Path] = {}
    for root in reversed(experiment_roots(config_dir)):
        folder = root / EXPERIMENTS
        found |= {path.parent.relative_to(folder).as_posix(): path for path in folder.rglob(file)}
    return found


def _home() -> Path:
    """Returns the folder of configs/ and experiments/: the package in a wheel, its parent in a checkout."""
    package = Path(gemma2_jax.__file__).resolve().parent
    return package if (package / "configs" / "train.yaml").is_file() else package.parent


def _own(config_dir: str | os.PathLike[str] | None) -> list[Path]:
    if config_dir is None:
        return []
    folder = Path(
        os.path.realpath(config_dir)
    )  # realpath accepts circular links, which are then not a folder
    if not folder.is_dir():
        raise UserError(
            f"--config-dir is {config_dir}, which is not a folder; accepted: a folder with groups, "
            "such as model/NAME.yaml."
        )
    return [folder]
