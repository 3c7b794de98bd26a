"""A name stands for one thing: no class, function or file of the package shares its name with another subject's."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).parent.parent / "gemma2_jax"

# Functions of one name that do the same in each of these: `cli` names its functions after the verbs, and each
# engine of `launching` has the functions that `cli/launch.py` calls.
SAME_FUNCTIONS = {
    "check_tools": {"launching/gke.py", "launching/slurm.py", "launching/tpu_vm.py"},
    "submission": {"launching/gke.py", "launching/tpu_vm.py"},
}


def definitions(kind: type[ast.ClassDef] | type[ast.FunctionDef], source: str) -> set[str]:
    """The public classes or functions of a source text."""
    return {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, kind) and not node.name.startswith("_")
    }


def shared(names: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """The names that several files have, each with its files; `names` are those of each file."""
    files: dict[str, set[str]] = {}
    for file, found in names.items():
        for name in found:
            files.setdefault(name, set()).add(file)
    return {name: where for name, where in files.items() if len(where) > 1}


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }


def test_no_two_classes_share_a_name():
    assert shared({file: definitions(ast.ClassDef, source) for file, source in sources().items()}) == {}


def test_functions_of_one_name_do_the_same():
    found = shared(
        {
            file: definitions(ast.FunctionDef, source)
            for file, source in sources().items()
            if not file.startswith("cli/")
        }
    )
    assert found == SAME_FUNCTIONS


def test_files_of_one_name_have_one_subject():
    files = sources()
    verbs = {
        file for file, source in files.items() if file.startswith("cli/") and "def add_parser(" in source
    }
    found = shared({file: [PurePosixPath(file).name] for file in files})
    for name in ("__init__.py", "config.py"):  # of a room: what it is, and its part of the configuration
        del found[name]
    # A verb has a file of its own name in `cli`, beside the one file elsewhere that does it.
    assert {name: where for name, where in found.items() if len(where) > 2 or not where & verbs} == {}


def test_the_checks_find_shared_names():
    assert definitions(ast.ClassDef, "class A: ...\nclass _B: ...\ndef c(): ...") == {"A"}
    assert definitions(ast.FunctionDef, "class A:\n    def b(self): ...\ndef c(): ...") == {"c"}
    assert shared({"a/x.py": ["A", "B"], "b/y.py": ["A"]}) == {"A": {"a/x.py", "b/y.py"}}
