"""Private names of libraries are each in one file of their room, and a test of that file says what breaks without."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.private_names import private

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma2_jax"
FILES = {
    "cli/hydra_private.py": "hydra",
    "formats/gguf_private.py": "gguf",
    "formats/litert_private.py": "litert_converter",
    "launching/submitit_private.py": "submitit",
    "processes/jax_private.py": "jax",
}


def is_private(name: str) -> bool:
    """Whether a dotted name of a library has a private part; Python's own and this package's do not count."""
    first, *rest = name.split(".")
    ours = first == "gemma2_jax" or first in sys.stdlib_module_names
    return not ours and any(re.match(r"_(?!_)", part) for part in [first, *rest])


def private_names(source: str) -> Iterator[str]:
    """The private names of libraries in a source text: imported, as attributes, overridden, and named in strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            names = (
                [f"{base}.{node.attr}"]
                if is_private(f"?.{node.attr}") and base not in ("self", "cls")
                else []
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"[A-Za-z]\w*([.:]\w+)+", node.value) else []
            names = [name.replace(":", ".") for name in names]
        else:
            names = []
        yield from filter(is_private, names)


def test_private_names_are_in_a_file_of_their_own() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if list(private_names(path.read_text(encoding="utf-8")))
    }
    assert found == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_each_file_is_of_one_library_and_has_a_test(file: str) -> None:
    names = list(private_names((PACKAGE / file).read_text(encoding="utf-8")))
    roots = {name.split(".")[0] for name in names if "(" not in name}
    assert roots - {"super"} <= {FILES[file], "distributed", "ClusterEnv"}
    room, _, name = file.partition("/")
    assert (ROOT / "tests" / room / f"test_{name}").is_file()


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import distributed",
        "import jax._src.distributed as d",
        "def f():\n    from submitit.slurm.slurm import _make_sbatch_string",
        "command = ['-m', 'submitit.core._submit']",
        "import jax\njax._src.config",
        "class A(gguf.GGUFReader):\n    def _b(self):\n        return super()._b()",
        "find_spec('orbax.checkpoint._src:x')",
    ],
)
def test_the_check_sees_private_names(source: str) -> None:
    assert len(list(private_names(source))) == 1


def test_the_check_passes_over_what_is_public_or_ours() -> None:
    source = """
import os, _thread
from gemma2_jax.data import _ours
os._exit(0)
self._x = cls._y
__name__.__class__
"a sentence. _with_ all kinds of signs."
"""
    assert list(private_names(source)) == []


def test_what_is_gone_or_changed_is_told() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"^jax:_gone of jax \d.* is gone \(.*\): nothing works\.$"
    ):
        private("jax", "jax:_gone", "nothing works")
    with pytest.raises(pytest.fail.Exception, match=r"takes \['operand'.*\], not \['x'\]: nothing works\.$"):
        private("jax", "jax.lax:cumsum", "nothing works", ["x"])
    assert private("jax", "jax.lax:cumsum", "nothing works", ["operand"])
