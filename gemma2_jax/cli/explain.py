"""Explains configuration keys: meaning (from the dataclasses' docstrings), type, value and file."""

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.cli.compose import chosen_files, keys, pairs
from gemma2_jax.cli.mistakes import nearest_key
from gemma2_jax.config import UserError, describe_type, read_yaml, section_of, to_dict, to_yaml, type_of
from gemma2_jax.run import RunConfig

_WIDTH = 100


def explain_key(
    key: str | None, values: Mapping[str, Any], overrides: list[str], config_dir: str | None
) -> str:
    """Returns a key's meaning, type and value, and the file that sets it; for a section, also its keys.

    Args:
        key: dotted key; None for the whole configuration.
        values: the composed values, possibly without the code's defaults.
        overrides, config_dir: the inputs that the values were composed from.

    Raises:
        UserError: there is no such key.
    """
    kind = RunConfig if key is None else type_of(RunConfig, key)
    if kind is None:
        near = nearest_key(str(key), [*keys(), *(name.rpartition(".")[0] for name in keys() if "." in name)])
        hint = "`gemma2 config explain` lists them" if near is None else f"did you mean {near}?"
        raise UserError(f"there is no key {key}; {hint}" + ("." if near is None else ""))
    section = section_of(kind)
    lines = [] if key is None else _about(key, kind, values, overrides, config_dir)
    if section is not None:
        above = "" if key is None else f"{key}."
        names = [field.name for field in fields(section)]
        width = max(len(name) for name in names) + len(above)
        lines += [
            f"  {above + name:<{width}}  {_first_sentence(meaning(section, name))}".rstrip() for name in names
        ]
    return "\n".join(lines)


def meaning(section: Any, name: str) -> str:
    """Returns a dataclass docstring's text on one field, on one line; empty if there is none."""
    found = ""
    for names, text in _attributes(section):
        if name in names:
            found = text
    if not found:  # the field is a section of its own
        inner = section_of(type_of(section, name))
        found = "" if inner is None else str(inspect.getdoc(inner)).split("\n\n")[0].replace("\n", " ")
    return found


def with_comments(config: Any) -> str:
    """Returns `to_yaml(config)` with each key's meaning as a comment above it."""
    return "\n".join(_commented(config, "")) + "\n"


def _about(
    key: str, kind: Any, values: Mapping[str, Any], overrides: list[str], config_dir: str | None
) -> list[str]:
    above, _, name = key.rpartition(".")
    owner = RunConfig if not above else section_of(type_of(RunConfig, above))
    text = "" if owner is None else meaning(owner, name)
    rows = [("type", describe_type(kind))]
    value = _value(key, values)
    if not isinstance(value, dict):
        rows.append(("value", json.dumps(value, ensure_ascii=False).strip('"')))
        rows.append(("set in", _origin(key, overrides, config_dir)))
    if "." in key or is_dataclass(section_of(kind)):
        rows.append(("group", key.split(".")[0]))
    return [key, *textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  "), ""] + [
        f"  {title:<7} {row}" for title, row in rows
    ]


def _value(key: str, values: Mapping[str, Any]) -> Any:
    """Returns a key's value from a file or the code's default; None for keys of a section that is null."""
    value: Any = values
    above = RunConfig
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value[part] if part in value else _default(section_of(above), part)
        above = type_of(above, part)
    return value


def _default(section: Any, name: str) -> Any:
    field = next((field for field in fields(section) if field.name == name), None) if section else None
    if field is None or (field.default is MISSING and field.default_factory is MISSING):
        return None
    return to_dict(field.default if field.default_factory is MISSING else field.default_factory())


def _origin(key: str, overrides: list[str], config_dir: str | None) -> str:
    """Returns where a key is set: on the command line, else in a file, else by the dataclass's default."""
    for given, value in pairs(overrides):
        inner = key.removeprefix(f"{given}.").split(".")[0]
        if given == key or (isinstance(value, dict) and key.startswith(f"{given}.") and inner in value):
            return "the command line"
    for path, section in chosen_files(overrides, config_dir):
        if section and not key.startswith(f"{section}."):
            continue
        data: Any = read_yaml(path)
        for part in key.removeprefix(f"{section}.").split("."):
            data = data.get(part, _ABSENT) if isinstance(data, dict) else _ABSENT
        if data is not _ABSENT:
            return _relative(path)
    return "no file (the default in the code)"


_ABSENT = object()


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _attributes(section: Any) -> Iterator[tuple[list[str], str]]:
    """Yields each entry under `Attributes:` in a docstring: its names, and its text on one line."""
    _, _, block = (inspect.getdoc(section) or "").partition("Attributes:\n")
    entry = re.compile(r" {4}(\w+(?:, \w+)*): ")
    names: list[str] = []
    text: list[str] = []
    for line in block.splitlines():
        if line and not line.startswith(" "):  # another part of the docstring follows
            break
        begins = entry.match(line)
        if begins is not None:
            if names:
                yield names, " ".join(text)
            names, text = begins[1].split(", "), [line[begins.end() :].strip()]
        elif line.strip():
            text.append(line.strip())
    if names:
        yield names, " ".join(text)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")


def _commented(config: Any, indent: str) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        text = meaning(type(config), field.name)
        yield from textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _commented(value, indent + "  ")
        else:
            yield from (indent + line for line in to_yaml({field.name: value}).splitlines())
