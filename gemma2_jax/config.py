"""Plain data to typed configuration and back, with one sentence for each mistake.

Each subpackage keeps its own frozen dataclass beside the code that it configures. This module depends on none of them:
it builds any such dataclass from a mapping, and saves and loads it as YAML.
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

from gemma2_jax.files import folders_to_extend, in_the_way, obstacle_clause, reason, write_text
from gemma2_jax.messages import one_line, quoted
from gemma2_jax.yaml_dialect import Dumper, Loader

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake in what the user gave.

    The message has one line per mistake: a sentence that states what is wrong and what is accepted.
    """


def refuse(complaints: Iterable[str]) -> None:
    """Raises UserError with all complaints together, if there are any."""
    if found := list(complaints):
        raise UserError("\n".join(found))


@contextmanager
def usable(key: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises UserError, which names the key, if the file or folder that the key is set to cannot be used."""
    try:
        yield
    except BlockingIOError:  # another process uses it, so it is usable
        raise
    except OSError as error:
        raise _unusable(key, path, reason(error, path)) from None


def check_place(key: str, path: str | os.PathLike[str], is_file: bool = False) -> None:
    """Raises UserError, which names the key, if the folder that the key is set to does not exist and cannot be made.

    An existing folder may be read-only; whether it is writable shows only when something is written.

    Args:
        is_file: whether the key is set to a file; then the file's folder is checked.
    """
    folder = Path(path).parent if is_file else Path(path)
    file = in_the_way(folder)
    if file is not None:
        raise _unusable(key, path, obstacle_clause(file))
    for above in folders_to_extend(folder):
        if not os.access(above, os.W_OK | os.X_OK):
            raise _unusable(key, path, f"nothing can be made in {above} (Permission denied)")


def _unusable(key: str, path: str | os.PathLike[str], why: str) -> UserError:
    return UserError(f"{key} is {path}, which cannot be used: {why}.")


def build(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Returns the dataclass `cls` made from `data`, nested mappings becoming nested dataclasses.

    Types are strict: a whole number may stand for a float, but nothing else is converted (true is not 1, "3" is not 3).
    Lists become tuples where the dataclass has tuples.

    Args:
        where: source of the data (a file, "the command line"), with which an error message begins.

    Raises:
        UserError: unknown or missing keys, or wrong types or values; if there are none of these, combinations that a
            dataclass refuses. The message has a line for each.
    """
    try:
        # Validated as JSON: in strict mode pydantic turns a JSON list into a tuple, but refuses a Python list.
        document = json.dumps({"root": data}, default=_to_plain)
    except TypeError as error:
        raise UserError(f"{where} holds a value that is not plain data: {error}.") from None
    _refuse_huge(data, where)
    try:
        built: Config = _adapter(cls).validate_json(document)["root"]  # type: ignore[arg-type]  # classes are hashable
        return built
    except ValidationError as error:
        complaints = _sentences(cls, data, error)
        raise UserError(
            "\n  ".join([f"{where}:", *complaints]) if complaints[1:] else f"{where}: {complaints[0]}"
        ) from None


def _refuse_huge(value: Any, where: str, key: str = "") -> None:
    """Raises UserError for a whole number of more than 64 bits, which neither arrays nor floats hold."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: {key} is a whole number of more than 18 digits; accepted: less than 2^63.")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, item in items:
        _refuse_huge(item, where, f"{key}.{name}" if key else str(name))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the dataclass as nested dicts, lists and scalars, which YAML and JSON can hold."""
    plain: dict[str, Any] = _to_plain(config)
    return plain


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], missing: Any = None, above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted key and both values of each difference between two nested dicts; `missing` for an absent key."""
    for name in dict.fromkeys([*other, *one]):
        first, second = one.get(name, missing), other.get(name, missing)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from differences(first, second, missing, f"{above}{name}.")
        elif first != second:
            yield f"{above}{name}", first, second


def as_override(key: str, value: Any) -> str | None:
    """Returns `key=value` as typed on the command line; None for values that are not a single word."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if value is None or isinstance(value, int | float):
        return f"{key}={'null' if value is None else value}"
    return f"{key}={value}" if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) else None


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the dataclass to `path` as YAML; `load_config` returns an equal one."""
    write_text(path, to_yaml(config))


def to_yaml(config: Any) -> str:
    """Returns the dataclass as the YAML that `save_config` writes."""
    text: str = yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
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
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read.") from None
    if data is None and _is_blank(text):
        raise UserError(f"{path} is empty; keys and values are expected.")
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {quoted(data)} where keys and values are expected.")
    return data


def _is_blank(text: str) -> bool:
    """Whether YAML text holds nothing but comments."""
    return all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines())


def type_of(cls: Any, key: str) -> Any:
    """Returns the type of a dotted key of the dataclass; None if there is no such key."""
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
    """Returns the dataclass among the members of a type (`MatchConfig | None`); None if there is none."""
    return next((option for option in options_of(kind) if dataclasses.is_dataclass(option)), None)


def options_of(kind: Any) -> Iterator[Any]:
    """Yields the members of a union, or the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        yield from get_args(kind)
    else:
        yield kind


def as_typed(kind: Any, value: Any, text: str) -> Any:
    """Returns `text` instead of the `value` parsed from it, where the key takes text and not a value of that type.

    `name=1e3` names a run 1e3 and not 1000.0; `tokenizer.path=null` names a file; `distill.teacher=null` stays null,
    since that key accepts null.
    """
    options = list(options_of(kind))
    if isinstance(value, list) and tuple[str, ...] in options:
        items = [item.strip() for item in text.strip().removeprefix("[").removesuffix("]").split(",")]
        if len(items) == len(value):  # else a quoted item holds a comma
            return [as_typed(str, *pair) for pair in zip(value, items, strict=True)]
    plain = value is None or isinstance(value, bool | int | float)
    return text.strip() if plain and str in options and type(value) not in options else value


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the content of a JSON file. Raises UserError if the file is missing, cut off or not JSON."""
    text = None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a BOM in front
        return json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    except (ValueError, RecursionError) as error:  # ValueError includes wrong encodings
        if text is not None and not text.strip():
            raise UserError(f"{path} is empty; JSON is expected.") from None
        raise UserError(f"{path} is cut off or not valid JSON: {error}.") from None


def suggest(name: str, accepted: Iterable[str]) -> str:
    """Returns "did you mean A (accepted: A, B, …)", nearest name first, to end the sentence about a wrong name."""
    names = sorted(accepted)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {near[0]} (accepted: {listed})" if near else f"accepted: {listed}"


@cache
def _adapter(cls: Any) -> TypeAdapter[dict[str, Any]]:
    # pydantic takes settings for a stdlib dataclass only from an enclosing type, hence the dict around the class.
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
    """Returns one sentence per mistake, unknown keys first; of the errors about one part, only the most specific ones.

    A part is a key, or all keys of a dataclass: a misspelt key would otherwise also be reported as a missing one.
    """
    parts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    errors: list[Any] = error.errors(include_url=False)
    for item in errors:
        # Where a key takes a number or nested keys (a schedule) and got nested keys, the errors about those are more
        # specific than the error that they are not a number.
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
        # Each member of a union has an error of its own, and all mean the same.
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
    if first["type"] == "missing" and dataclasses.is_dataclass(kind):  # otherwise a list is too short
        missing = ".".join([*keys, str(first["loc"][-1])])
        return f"{missing} is missing; accepted: {describe_type(_hints(kind)[str(first['loc'][-1])])}."
    if first["type"] == "value_error":
        return _in_full(str(first["ctx"]["error"]), keys)
    is_text = str in options_of(kind) and isinstance(value, bool | int | float)
    hint = f" Write it in quotes for text: '{quoted(value)}'." if is_text else ""
    return f"{key or 'the content'} is {quoted(value)}; accepted: {describe_type(kind)}.{hint}"


def _in_full(sentence: str, keys: Sequence[str]) -> str:
    """Completes the key in a dataclass's own message.

    A message about `model.num_layers` becomes one about `distill.model.num_layers` if the dataclass is at
    `distill.model`.
    """
    if len(keys) < 2:
        return sentence
    own = re.escape(keys[-1])
    return re.sub(rf"(?<![\w.]){own}\.(?=\w)", f"{'.'.join(keys)}.", sentence)


def _resolve(cls: type, data: Any, location: list[str]) -> tuple[list[str], Any, Any]:
    """Follows an error's location while it names keys; the rest is pydantic's note on which type it tried."""
    keys: list[str] = []
    kind: Any = cls
    for part in location:
        inner = section_of(kind)
        items = section_of(get_args(kind)[0]) if get_origin(kind) is tuple else None
        if items is not None and isinstance(data, list) and part.isdigit():
            keys[-1] += f"[{part}]"
            kind, data = items, data[int(part)]
            continue
        if get_origin(kind) is dict and isinstance(data, Mapping) and part in data:
            kind = get_args(kind)[1]
        elif inner is not None and isinstance(data, Mapping) and part in data and part in _hints(inner):
            kind = _hints(inner)[part]
        elif inner is not None and isinstance(data, Mapping):
            kind = inner  # a union: the location names its member next
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
    """Returns a description of the values that a key of this type accepts."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    accepted = []
    for option in options_of(kind):
        if get_origin(option) is Literal:
            accepted.append(" or ".join(str(choice) for choice in get_args(option)))
        elif get_origin(option) is tuple and Ellipsis not in get_args(option):
            inner = get_args(option)
            accepted.append(f"a list of {len(inner)}, each {describe_type(inner[0])}")
        elif get_origin(option) in (tuple, list):
            accepted.append(f"a list of {describe_type(get_args(option)[0])}")
        elif dataclasses.is_dataclass(option):
            accepted.append("keys " + ", ".join(field.name for field in dataclasses.fields(option)))
        elif get_origin(option) is dict:
            accepted.append("names, each with " + describe_type(get_args(option)[1]))
        else:
            accepted.append(words.get(option, str(option)))
    return " or ".join(accepted)
