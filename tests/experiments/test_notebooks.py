"""Notebooks run from top to bottom, their text is supported by their output, and the stored output is a fresh one.

A cell's tags state what of its text is compared with a fresh run: with `exact`, everything; with `varies` (texts that a
model writes, or lists that small differences reorder), nothing; by default, words, and numbers within tolerances.
Words and numbers depend on the documentation in the running Python and on rounding, so those of cells without `exact`
are compared only with the versions of Python and JAX that the notebook's metadata records.
"""

import ast
import base64
import os
import platform
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import gemma2_jax as g2

NOTEBOOKS = Path(__file__).parents[2] / "experiments" / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
RELATIVE, ABSOLUTE = 0.05, 0.02  # tolerances of numbers
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
LARGEST = 400_000  # bytes of a notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> str:
    """The text that a cell prints, without what goes to stderr: progress, speeds and paths."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def kinds(cell: Any) -> list[str]:
    """The kinds of a cell's outputs in order: stdout, picture or other; without progress."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append(output.name)
        else:
            found.append("picture" if "image/png" in output.get("data", {}) else output.output_type)
    shown = [kind for kind in found if kind not in ("stderr", "display_data")]
    return [kind for kind, _ in groupby(shown)]  # what a cell prints may come in parts


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in NUMBER.findall(text)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_uses_the_public_api_alone(path: Path) -> None:
    source = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [ast.unparse(node) for node in imports if "gemma2_jax" in ast.unparse(node)]
    assert ours == ["import gemma2_jax as g2"]
    used = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "g2"
    }
    assert used <= set(g2.__all__)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_output_is_stored(path: Path) -> None:
    """Pictures and text, without speeds, times of execution, or paths of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < LARGEST
    assert set(notebook.metadata.outputs_from) == {"python", "jax"}
    stored = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [
        output for output in stored if output.get("name") == "stderr" or output.output_type == "error"
    ]
    assert not [cell for cell in code_cells(notebook) if set(cell.metadata) - {"tags"}]
    text = "".join(map(texts, code_cells(notebook)))
    assert "/tmp" not in text
    assert str(Path.home()) not in text
    pictures = [output.data["image/png"] for output in stored if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Runs a notebook with the kernel's own devices, compares its outputs, and returns the text of each cell."""

    def run_notebook(name: str) -> list[str]:
        monkeypatch.delenv("XLA_FLAGS")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
        stored, fresh = (nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for _ in range(2))
        NotebookClient(fresh, timeout=900, resources={"metadata": {"path": os.fspath(tmp_path)}}).execute()
        versions = {"python": platform.python_version(), "jax": jax.__version__}
        compare(stored, fresh, alike=versions == dict(stored.metadata.outputs_from))
        return [texts(cell) for cell in code_cells(fresh)]

    return run_notebook


def compare(stored: Any, fresh: Any, alike: bool) -> None:
    """Asserts that fresh outputs are those that are stored.

    Args:
        alike: whether both are of the same versions of Python and JAX.
    """
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert kinds(before) == kinds(after), before.source
        tags, old, new = before.metadata.get("tags", []), texts(before), texts(after)
        if "exact" in tags:
            assert old == new
        elif alike and "varies" not in tags:
            assert NUMBER.sub("#", old) == NUMBER.sub("#", new)
            assert numbers(new) == pytest.approx(numbers(old), rel=RELATIVE, abs=ABSOLUTE)


def found_in(pattern: str, cells: list[str]) -> list[Any]:
    """Tuples of the numbers in the groups of a pattern, for each place where the text of the cells has it."""
    matches = re.findall(pattern, "".join(cells))
    assert matches, pattern
    rows = [match if isinstance(match, tuple) else (match,) for match in matches]
    return [tuple(float(each.replace(",", "")) for each in row) for row in rows]


@pytest.mark.thorough
def test_meet_gemma2(run: Callable[[str], list[str]]) -> None:
    cells = run("meet_gemma2")
    text = "".join(cells)
    assert "2,614,636,800 parameters" in text
    assert text.count(", as in the report") == 3
    layers = dict(found_in(r"layer (\d) .* beyond the window ([\d.]+)", cells))
    assert layers[0] == layers[2] == 0 < min(layers[1], layers[3])
    assert {hidden for (hidden,) in found_in(r"a later token ([\d.]+)", cells)} == {0}
    (capped, logit), (free, larger) = found_in(
        r"cap: largest weight ([\d.]+), largest logit ([\d,.]+)", cells
    )
    assert capped < free
    assert logit <= 30 < larger


@pytest.mark.thorough
def test_distil(run: Callable[[str], list[str]]) -> None:
    cells = run("distil")
    (losses,) = found_in(r"of the teacher: ([\d.]+) ([\d.]+) ([\d.]+)", cells)
    assert list(losses) == sorted(losses, reverse=True)
    (taught, *kl), (alone, *other) = found_in(r"cross-entropy ([\d.]+), KL from ([\d.]+) to ([\d.]+)", cells)
    assert kl[1] < 0.5 * kl[0]
    assert kl[1] < other[1]
    assert taught < alone


@pytest.mark.thorough
def test_look_inside(run: Callable[[str], list[str]]) -> None:
    cells = run("look_inside")
    far = dict(found_in(r"layer (\d): ([\d.]+)% of the attention", cells))
    assert far[2] == 0 < far[3]
    (losses,) = found_in(r"after each layer: ([\d.]+) ([\d.]+) ([\d.]+) ([\d.]+) nats", cells)
    assert losses[-1] == min(losses)
    (sizes,) = found_in(r"square after each layer: ([\d.]+) ([\d.]+) ([\d.]+) ([\d.]+)", cells)
    assert list(sizes) == sorted(sizes)


@pytest.mark.thorough
def test_read_a_sweep(run: Callable[[str], list[str]]) -> None:
    cells = run("read_a_sweep")
    assert len(found_in(r"([\d,]+) parameters, +([\d,]+) tokens", cells)) == 9
    losses = found_in(r"width \d+: ([\d.]+) ([\d.]+) ([\d.]+) nats", cells)
    for row in losses:  # more tokens help
        assert list(row) == sorted(row, reverse=True)
    ((largest,),) = found_in(r"a run and the law: ([\d.]+)", cells)
    assert largest < 0.15


@pytest.mark.thorough
def test_plan_a_pod_job(run: Callable[[str], list[str]]) -> None:
    cells = run("plan_a_pod_job")
    ((total, fitting),) = found_in(r"(\d+) settings of 16 v5e chips, (\d+) of which", cells)
    assert 0 < fitting < total
    pairs = found_in(r"planned +([\d,]+) bytes, estimated +([\d,]+)", cells)
    for planned, estimated in pairs[:4]:  # parameters, moments, gradients, teacher
        assert planned == pytest.approx(estimated, abs=16)  # the optimizer counts its steps
    assert "'fsdp': 1, 'tensor': 1}: " in "".join(cells)


@pytest.mark.thorough
def test_fine_tune_and_merge(run: Callable[[str], list[str]]) -> None:
    cells = run("fine_tune_and_merge")
    assert "below 0.001: True" in "".join(cells)
    rows = found_in(r"text ([\d.]+), module ([\d.]+), purpose ([\d.]+)", cells)
    base, module, purpose, quarter, whole = rows
    assert module[1] < 0.5 * base[1]  # each adapter learns its task
    assert purpose[2] < base[2]
    assert whole[0] > quarter[0] > base[0]  # and forgets of the text
    assert quarter[1] < base[1]
    assert quarter[2] < base[2]
