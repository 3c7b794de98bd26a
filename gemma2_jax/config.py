"""Plain data to typed configuration and back, with every mistake told in one sentence.

Each room keeps its own frozen dataclass beside the code that it configures. This module knows none of
them: it builds any such dataclass from a mapping, and saves and loads it as YAML.
"""

import dataclasses
import difflib
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gemma2_jax.files import in_the_way, nearest_folder, no_folder, reason, write_text

Config = TypeVar("Config")


class UserError(ValueError):
    """Something that the user gave is wrong; the message says what and what is accepted, one sentence for each thing,
    each on a line of its own."""


def refuse(complaints: Iterable[str]) -> None:
    """Raises UserError with all complaints together, if there are any."""
    if found := list(complaints):
        raise UserError("\n".join(found))


@contextmanager
def usable(key: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises UserError, naming the key, where the file or folder that it is set to cannot be used."""
    try:
        yield
    except BlockingIOError:  # in use, and so usable
        raise
    except OSError as error:
        raise _unusable(key, path, reason(error, path)) from None


def check_place(key: str, path: str | os.PathLike[str], is_file: bool = False) -> None:
    """Raises UserError, naming the key, where the folder that it is set to is not there and cannot be made.

    A folder that is there may be read alone, and whether it can be written to is found when that is done.

    Args:
        is_file: the key is set to a file, whose folder is checked.
    """
    folder = Path(path).parent if is_file else Path(path)
    file, nearest = in_the_way(folder), nearest_folder(folder)
    if file is not None:
        raise _unusable(key, path, no_folder(file))
    if not folder.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(key, path, f"nothing can be made in {nearest} (Permission denied)")


def _unusable(key: str, path: str | os.PathLike[str], why: str) -> UserError:
    return UserError(f"{key} is {path}, which cannot be used: {why}.")


def build(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Returns the dataclass `cls` made from `data`, nested mappings becoming nested dataclasses.

    Types are taken at their word: a whole number may stand for a float, but nothing else is converted
    (no true for 1, no "3" for 3). Lists become tuples where the dataclass says so.

    Args:
        where: what the data came from (a file, "the command line"); begins the sentence of an error.

    Raises:
        UserError: unknown or missing keys, wrong types or values, and, where there is none of these, combinations that
            a dataclass refuses; all of them, one a line.
    """
    try:
        # JSON is what makes strict types bearable: it knows lists only, so a list may become a tuple.
        document = json.dumps({"root": data}, default=_to_plain)
    except TypeError as error:
        raise UserError(f"{where} holds something that is no plain value: {error}.") from None
    try:
        built: Config = _adapter(cls).validate_json(document)["root"]  # type: ignore[arg-type]  # classes are hashable
        return built
    except ValidationError as error:
        complaints = _sentences(cls, data, error)
        raise UserError(
            "\n  ".join([f"{where}:", *complaints]) if complaints[1:] else f"{where}: {complaints[0]}"
        ) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the dataclass as nested dicts, lists and scalars: what YAML and JSON can hold."""
    plain: dict[str, Any] = _to_plain(config)
    return plain


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], missing: Any = None, above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The dotted key and both values of what differs between two nested dicts; `missing` for a key that one lacks."""
    for name in dict.fromkeys([*other, *one]):
        first, second = one.get(name, missing), other.get(name, missing)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from differences(first, second, missing, f"{above}{name}.")
        elif first != second:
            yield f"{above}{name}", first, second


def as_override(key: str, value: Any) -> str | None:
    """Returns `key=value` as it is typed; None for values that take more than a word."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if value is None or isinstance(value, int | float):
        return f"{key}={'null' if value is None else value}"
    return f"{key}={value}" if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) else None


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the dataclass to `path` as YAML; `load_config` gives an equal one back."""
    write_text(path, to_yaml(config))


def to_yaml(config: Any) -> str:
    """Returns the dataclass as the YAML that `save_config` writes."""
    text: str = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def load_config(cls: type[Config], path: str | os.PathLike[str]) -> Config:
    """Returns the dataclass `cls` from the YAML file at `path`. Raises UserError as `build` does."""
    return build(cls, read_yaml(path), str(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises UserError if there is no such file or it holds no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8.") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read.") from None
    if data is None and _is_blank(text):
        raise UserError(f"{path} is empty; keys and values are expected.")
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {_shown(data)} where keys and values are expected.")
    return data


def _is_blank(text: str) -> bool:
    """Whether there is nothing in YAML but comments."""
    return all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines())


def type_of(cls: Any, key: str) -> Any:
    """Returns the type that the dataclass gives a dotted key; None where it has no such key."""
    kind = cls
    for part in key.split("."):
        inner = section_of(kind)
        if inner is not None and part in _hints(inner):
            kind = _hints(inner)[part]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    return kind


def section_of(kind: Any) -> Any:
    """Returns the dataclass that a type holds, perhaps beside other types (`MatchConfig | None`); None without one."""
    return next((option for option in options_of(kind) if dataclasses.is_dataclass(option)), None)


def options_of(kind: Any) -> Iterator[Any]:
    """Yields the members of a union, or the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        yield from get_args(kind)
    else:
        yield kind


def as_typed(kind: Any, value: Any, text: str) -> Any:
    """Returns `text` in place of the `value` that it was read as, where a key takes text and no such value.

    `name=1e3` names a run 1e3 and not 1000.0, `tokenizer.path=null` a file; `distill.teacher=null` remains null, since
    that key takes it.
    """
    options = list(options_of(kind))
    if isinstance(value, list) and tuple[str, ...] in options:
        items = [item.strip() for item in text.strip().removeprefix("[").removesuffix("]").split(",")]
        if len(items) == len(value):  # else a quoted item holds a comma
            return [as_typed(str, *pair) for pair in zip(value, items, strict=True)]
    plain = value is None or isinstance(value, bool | int | float)
    return text.strip() if plain and str in options and type(value) not in options else value


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns what a JSON file holds. Raises UserError if there is no such file or it is cut or broken."""
    text = None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a BOM in front
        return json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    except (ValueError, RecursionError) as error:  # of the encoding, too
        if text is not None and not text.strip():
            raise UserError(f"{path} is empty; JSON is expected.") from None
        raise UserError(f"{path} is cut or broken, and no JSON: {error}.") from None


def suggest(name: str, accepted: Iterable[str]) -> str:
    """Returns "did you mean A (accepted: A, B, …)", nearest name first, to end the sentence about a wrong name."""
    names = sorted(accepted)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {near[0]} (accepted: {listed})" if near else f"accepted: {listed}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and texts: 1e-3 is a number (PyYAML asks for 1.0e-3), and 2024-01-01 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: it puts the text 1e-3 in quotes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In single quotes PyYAML folds the line breaks that only YAML 1.1 knows: double quotes escape them.
        style = '"' if any(break_ in data for break_ in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


@cache
def _adapter(cls: Any) -> TypeAdapter[dict[str, Any]]:
    # The dict around the class is there because pydantic takes settings for a stdlib dataclass only from outside.
    return TypeAdapter(dict[str, cls], config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__}")


_ORDER = {"unexpected_keyword_argument": 0, "value_error": 1, "missing": 2}


def _sentences(cls: type, data: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What is wrong, unknown keys first; of the errors about one part, the most telling ones alone.

    A part is a key, or the keys of a dataclass: a misspelt key is also a missing one.
    """
    parts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    errors: list[Any] = error.errors(include_url=False)
    for item in errors:
        # Keys and values where a single value could stand as well (a number or a schedule): what is wrong with them
        # tells more than that they are no number.
        rank = _ORDER.get(item["type"], 3 if isinstance(item["input"], dict) else 1)
        keys, _, _ = _resolve(cls, data, [str(part) for part in item["loc"][1:]])
        parts.setdefault(".".join(keys), []).append((rank, item))
    found: dict[str, int] = {}
    for name, items in parts.items():
        best = min(rank for rank, _ in items)
        if best == 3 and any(other.startswith(f"{name}.") for other in parts):
            continue
        chosen = [item for rank, item in items if rank == best]
        if best == 2 and chosen[1:]:
            above = f"{name}." if name else ""
            listed = ", ".join(f"{above}{item['loc'][-1]}" for item in chosen)
            found.setdefault(f"the keys {listed} are missing.", best)
            continue
        # Members of a union are refused for a reason each, which says the same.
        for item in chosen if best == 0 else chosen[:1]:
            for line in _sentence(cls, data, item).split("\n"):
                found.setdefault(line, best)
    return sorted(found, key=lambda line: found[line])


def _sentence(cls: type, data: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    keys, kind, value = _resolve(cls, data, [str(part) for part in first["loc"][1:]])
    key = ".".join(keys)
    if first["type"] == "unexpected_keyword_argument":
        names = [field.name for field in dataclasses.fields(kind)]
        unknown = str(first["loc"][-1])
        return f"there is no key {'.'.join([*keys, unknown])}, {suggest(unknown, names)}."
    if first["type"] == "missing" and dataclasses.is_dataclass(
        kind
    ):  # else an item of a list that is too short
        missing = ".".join([*keys, str(first["loc"][-1])])
        return f"{missing} is missing; accepted: {describe_type(_hints(kind)[str(first['loc'][-1])])}."
    if first["type"] == "value_error":
        return _in_full(str(first["ctx"]["error"]), keys)
    quoted = str in options_of(kind) and isinstance(value, bool | int | float)
    hint = f" In quotes it is text: '{_shown(value)}'." if quoted else ""
    return f"{key or 'the whole'} is {_shown(value)}; accepted: {describe_type(kind)}.{hint}"


def _in_full(sentence: str, keys: Sequence[str]) -> str:
    """A dataclass's own words about a key of its own, `model.num_layers`, for one that is at `distill.model`."""
    if len(keys) < 2:
        return sentence
    own = re.escape(keys[-1])
    return re.sub(rf"(?<![\w.]){own}\.(?=\w)", f"{'.'.join(keys)}.", sentence)


def _resolve(cls: type, data: Any, location: list[str]) -> tuple[list[str], Any, Any]:
    """Follows an error's location as far as it names keys; the rest is pydantic's note on which type it tried."""
    keys: list[str] = []
    kind: Any = cls
    for part in location:
        inner = section_of(kind)
        if get_origin(kind) is dict and isinstance(data, Mapping) and part in data:
            kind = get_args(kind)[1]
        elif inner is not None and isinstance(data, Mapping) and part in data and part in _hints(inner):
            kind = _hints(inner)[part]
        elif inner is not None and isinstance(data, Mapping):
            kind = inner  # of a union, whose member comes next in the location by its name
            if part != getattr(inner, "__name__", None):
                break
            continue
        else:
            break
        keys.append(part)
        data = data[part]
    return keys, kind, data


def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def describe_type(kind: Any) -> str:
    """Returns in words what a key of this type takes."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    told = []
    for option in options_of(kind):
        if get_origin(option) is Literal:
            told.append(" or ".join(str(choice) for choice in get_args(option)))
        elif get_origin(option) is tuple and Ellipsis not in get_args(option):
            inner = get_args(option)
            told.append(f"a list of {len(inner)}, each {describe_type(inner[0])}")
        elif get_origin(option) in (tuple, list):
            told.append(f"a list of {describe_type(get_args(option)[0])}")
        elif dataclasses.is_dataclass(option):
            told.append("keys " + ", ".join(field.name for field in dataclasses.fields(option)))
        elif get_origin(option) is dict:
            told.append("names, each with " + describe_type(get_args(option)[1]))
        else:
            told.append(words.get(option, str(option)))
    return " or ".join(told)


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False, default=str)
