"""Notebooks run from top to bottom, and their output supports their text."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import gemma2_jax as g2

NOTEBOOKS = Path(__file__).parents[2] / "experiments" / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_uses_the_public_api_alone(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [ast.unparse(node) for node in imports if "gemma2_jax" in ast.unparse(node)]
    assert ours == ["import gemma2_jax as g2"]
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "g2"
    }
    assert used <= set(g2.__all__)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All text of the notebook, run as it is in the repository with the kernel's own devices."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS / "build_and_distil.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": os.fspath(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.mark.thorough
def test_build_and_distil(outputs: str) -> None:
    assert "2,614,636,800 parameters" in outputs
    (line,) = [line for line in outputs.splitlines() if line.startswith("KL ")]
    first, last = (float(word) for word in line.split() if word.replace(".", "").isdigit())
    assert last < 0.5 * first
    assert outputs.count("student: ") == 2
