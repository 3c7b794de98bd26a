"""The documentation inside Python's own standard library: real text that every machine has.

The documents are the topics of the language reference (as shown by `help("LAMBDA")`), and the docstrings of every
module, of every class with its methods, and of every function. Source files are parsed, never imported, since
importing some modules of the standard library has side effects.
"""

import ast
import hashlib
import json
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from gemma2_jax.data.invalid import Skipped
from gemma2_jax.data.reading import reading

_Function = ast.FunctionDef | ast.AsyncFunctionDef
# Tests hold little prose, and site-packages differs between machines.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class PythonDocs:
    """The corpus of the running Python; each Python version has its own.

    Attributes:
        name: implementation and version of Python.
        files: source files, in a fixed order.
        size: bytes of all source files, the measure of progress.
        skipped: always empty: a file that does not parse is a template with the ending .py and has no documents.
    """

    def __init__(self) -> None:
        self.name = f"{platform.python_implementation()} {platform.python_version()}"
        self.skipped = Skipped()
        # The standard library of the base installation, also from within a virtual environment.
        self._root = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in self._root.rglob("*.py")
            if not _SKIPPED & set(path.relative_to(self._root).parts) and path.is_file()
        ]
        self.files = sorted(files, key=lambda path: path.relative_to(self._root).as_posix())
        self.size = sum(path.stat().st_size for path in self.files)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Yields each distinct document with the bytes of source files read so far, in a fixed order."""
        seen: set[str] = set()
        done = 0
        for path, texts in self._documents.items():
            done += path.stat().st_size
            for text in texts:
                if text not in seen:
                    seen.add(text)
                    yield text, done

    def role(self, path: Path) -> str:
        return ""

    def digest(self, path: Path, advance: Callable[[int], None]) -> str:
        """Returns the sha256 of a file's documents, not of the file: some files contain their installation path."""
        texts = self._documents[path]
        advance(path.stat().st_size)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    @cached_property
    def _documents(self) -> dict[Path, list[str]]:
        # Kept in memory: it is a few megabytes, and parsing takes longer than all later steps.
        return {path: list(_documents_of(path, self._module_name(path))) for path in self.files}

    def _module_name(self, path: Path) -> str:
        parts = path.relative_to(self._root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documents_of(path: Path, module: str) -> Iterator[str]:
    with reading(path):
        content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return  # a template with the ending .py
    if module == "pydoc_data.topics":
        yield from _topics(tree)
        return
    if docstring := ast.get_docstring(tree):
        yield f"{module}\n\n{docstring}"
    yield from _definitions(tree, module)


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            yield from (text.strip() for text in topics.values())


def _definitions(node: ast.AST, owner: str) -> Iterator[str]:
    """Yields one document per class or function at any depth outside classes (under `if` and `try` too)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            sections = list(_class_sections(child, f"{owner}.{child.name}"))
            if sections:
                yield "\n\n".join(sections)
        elif isinstance(child, _Function):
            if docstring := ast.get_docstring(child):
                yield f"{owner}.{_signature(child)}\n\n{docstring}"
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child, owner)


def _class_sections(node: ast.ClassDef, name: str) -> Iterator[str]:
    """Yields the class's docstring, then those of its methods and inner classes, each under a heading."""
    methods = []
    for child in node.body:
        if isinstance(child, _Function) and (docstring := ast.get_docstring(child)):
            methods.append(f"{_signature(child)}\n\n{docstring}")
        elif isinstance(child, ast.ClassDef):
            methods += _class_sections(child, f"{name}.{child.name}")
    docstring = ast.get_docstring(node)
    if docstring or methods:
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield "\n\n".join(filter(None, [f"class {name}({bases})" if bases else f"class {name}", docstring]))
        yield from methods


def _signature(node: _Function) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"
