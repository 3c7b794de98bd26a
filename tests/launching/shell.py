"""Helpers for bash scripts and fake programs."""

import subprocess
import sys
from pathlib import Path


def check_script(text: str, path: Path) -> None:
    """Asserts that shellcheck finds no problem in a script."""
    path.write_text(text)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
