"""Configuration from YAML groups, experiments and key=value overrides, by Hydra (and `hydra_private`).

    from gemma2_jax.cli.compose import compose
    config = compose(["experiment=quickstart/teacher", "training.steps=100"])

Hydra composes the files (groups, an experiment) and reads the grammar of the overrides. Values are then set
on the result and checked by the dataclasses, so that a wrong key or value is told in the same words
wherever it came from.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gemma2_jax.cli.hydra_private import load_configuration
from gemma2_jax.cli.roots import EXPERIMENTS, choices, config_roots, experiment_roots
from gemma2_jax.config import (
    UserError,
    as_typed,
    build,
    options_of,
    read_yaml,
    refuse,
    section_of,
    suggest,
    type_of,
)
from gemma2_jax.run import RunConfig

ROOT = "train"  # the name of the root file, configs/train.yaml
COMMAND_LINE = "the configuration"

# ${or:${key},other} in a YAML file: the key's value, or the other where that is null.
OmegaConf.register_new_resolver("or", lambda value, other: other if value is None else value, replace=True)


def compose(
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Returns the configuration of a run.

    Args:
        overrides: `group=NAME` (`model=gemma2_2b`, `experiment=quickstart/teacher`) and `key=value`
            (`training.steps=100`), in Hydra's grammar.
        config_dir: a folder of the user's own with groups and experiments; its files win over ours.
        values: more values by dotted key, set last, as they are.

    Raises:
        UserError: an override that is no key=value, a name that no group has, or what `build` refuses.
    """
    chosen, given = _chosen(overrides, config_dir)
    _check_name(given.get("name"))  # those in files are experiments' own, such as quickstart/teacher
    return _finish(_compose_files(chosen, config_dir), {**given, **(values or {})}, COMMAND_LINE)


def composed_values(
    overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Returns what `compose` would check, unchecked: the values of files and overrides, without the code's defaults.

    Raises:
        UserError: an override that is no key=value, of a key that does not exist, or a name that no group has.
    """
    chosen, given = _chosen(overrides, config_dir)
    for key in given:
        if type_of(RunConfig, key) is None:
            raise UserError(f"there is no key {key}, {suggest(key, keys())}.")
    return _resolved(_compose_files(chosen, config_dir), given, COMMAND_LINE)


def compose_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration saved at `path` (a run's config.yaml) with `key=value` overrides set on it."""
    chosen, values = _split(overrides)
    if chosen:
        group = next(iter(chosen))
        raise UserError(
            f"{group}={chosen[group]} chooses a file, but {path} is already composed; override its keys."
        )
    _check_name(values.get("name"))
    return _finish(read_yaml(path), values, str(path))


def combinations(overrides: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Takes the overrides that list several values apart from those that have one.

    Returns:
        Every combination of the former, the last one changing fastest (`["a=1,2", "c=x,y"]` gives
        `{"a": "1", "c": "x"}`, `{"a": "1", "c": "y"}`, …; one empty combination if nothing is listed), and
        the latter as they are. Choices (`a=1,2`) and ranges (`a=range(1,4)`) are read by Hydra's grammar.
    """
    lists: list[list[tuple[str, str]]] = []
    shared: list[str] = []
    for override in _parse(overrides):
        if not override.is_sweep_override():
            shared.append(str(override.input_line))
        elif override.value_type in (
            ValueType.CHOICE_SWEEP,
            ValueType.SIMPLE_CHOICE_SWEEP,
            ValueType.RANGE_SWEEP,
        ):
            lists.append([(override.key_or_group, text) for text in override.sweep_string_iterator()])
        else:
            raise UserError(
                f"{override.input_line} is not a list of values; accepted: key=A,B or key=range(1,4)."
            )
    return [dict(combination) for combination in itertools.product(*lists)], shared


def pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns the key and the value of each override, in order; names and keys of text have the text as typed.

    Raises:
        UserError: one of them lists several values.
    """
    found = []
    for override in _parse(overrides):
        key, _, text = str(override.input_line).partition("=")
        if override.is_sweep_override():
            raise UserError(
                f"{key}={text} lists several values, which only `gemma2 sweep` takes{_as_list(key, text)}."
            )
        # What chooses a file is a name; a key that does not exist is refused later, with its value as it was read.
        kind = str if key in groups() else type_of(RunConfig, key)
        found.append((override.key_or_group, as_typed(kind, override.value(), text)))
    return found


def _as_list(key: str, text: str) -> str:
    """Returns how several values of a key that takes a list are given, as the end of a sentence."""
    accepts_list = any(get_origin(option) in (tuple, list) for option in options_of(type_of(RunConfig, key)))
    return f"; a list of them is in brackets and quotes: '{key}=[{text}]'" if accepts_list else ""


@cache
def groups() -> tuple[str, ...]:
    """Returns the names that choose a file: `experiment`, and every part of a run's configuration."""
    hints = get_type_hints(RunConfig)
    parts = [
        field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[field.name])
    ]
    return ("experiment", *parts)


@cache
def keys() -> tuple[str, ...]:
    """Returns every dotted key of a run's configuration, in its order, but for sections that are always there."""
    return tuple(_keys_of(RunConfig, ""))


def _keys_of(cls: Any, above: str) -> Iterable[str]:
    for name, kind in get_type_hints(cls).items():
        section = section_of(kind)
        if kind is not section:
            yield f"{above}{name}"
        if section is not None:
            yield from _keys_of(section, f"{above}{name}.")


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    for position, text in enumerate(overrides):
        override = None if _lacks_utf8(text) else _parse_one(text) or _parse_one(_quoted(text))
        plain = override is not None and override.type is OverrideType.CHANGE and override.package is None
        # `key= value`, which the shell cuts in two, begins like an empty value.
        cut = text.endswith("=") and position + 1 < len(overrides) and "=" not in overrides[position + 1]
        if override is None or not plain or not override.key_or_group or cut:
            raise UserError(_unreadable(overrides, position))
        parsed.append(override)
    return parsed


def _parse_one(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _quoted(text: str) -> str:
    """Puts the value of a key of text in quotes, by which the grammar takes blanks and letters of any language."""
    key, _, value = text.partition("=")
    takes_text = str in options_of(type_of(RunConfig, key))
    quote = next((quote for quote in "'\"" if quote not in value), None)
    plain = value != "" and value[0] not in "'\"[{ " and value[-1] not in "\\ "
    return f"{key}={quote}{value}{quote}" if takes_text and quote is not None and plain else text


def _lacks_utf8(text: str) -> bool:
    """Whether an argument holds bytes that Python could not decode, and has kept as lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _unreadable(overrides: Sequence[str], position: int) -> str:
    """Returns the sentence about an override that is no key=value; `key = value` has come in up to three pieces."""
    text = overrides[position]
    if _lacks_utf8(text):
        return f"{text!r} is not UTF-8; where the locale is not, LC_ALL=C.UTF-8 sets one that is."
    pieces = " ".join(overrides[position : position + 3])
    spaced = re.match(r"([A-Za-z_][\w.]*)(?: *= *|: +)([^\s=]+)", pieces)
    if spaced is not None and " " in spaced[0]:
        return f"{spaced[0]!r} cannot be read; write it without blanks: {spaced[1]}={spaced[2]}."
    return (
        f"{text!r} cannot be read; accepted: key=value, as in training.steps=100, "
        "where a value with blanks or signs is put in quotes, as in 'name=\"a b\"'."
    )


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Takes apart what chooses a file and what sets a value."""
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    for key, value in pairs(overrides):
        if key in groups() and not isinstance(value, dict):
            chosen[key] = str(value)
        else:
            values[key] = value
    return chosen, values


def _chosen(
    overrides: Sequence[str], config_dir: str | os.PathLike[str] | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """As `_split`. Raises UserError for names that no group has."""
    chosen, values = _split(overrides)
    accepted = {group: choices(group, config_dir) for group in chosen}
    refuse(
        f"there is no {group} {name}, {suggest(name, accepted[group])}."
        for group, name in chosen.items()
        if name not in accepted[group]
    )
    return chosen, values


def chosen_files(
    overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None
) -> list[tuple[Path, str]]:
    """Returns the files that a configuration is composed from, the one that wins first, each with its section.

    The section is that of the keys in the file: `model` for a file of that group, `distill.model` where it gives the
    teacher's sizes, and empty for the root and experiments, which set keys of all.
    """
    chosen, _ = _split(overrides)
    names = _load_files(chosen, config_dir)["hydra"]["runtime"]["choices"]
    found: list[tuple[Path, str]] = []
    if names.get(EXPERIMENTS):
        folders = [root / EXPERIMENTS for root in experiment_roots(config_dir)]
        found += [(path, "") for path in _with_bases(folders, names[EXPERIMENTS])]
    roots = config_roots(config_dir)
    found.append((_first_of(roots, ROOT), ""))
    for choice, name in names.items():
        group, _, section = choice.partition("@")
        if group in groups() and name:
            folders = [root / group for root in roots]
            found += [(path, section or group) for path in _with_bases(folders, name)]
    return found


def _with_bases(folders: Sequence[Path], name: str) -> list[Path]:
    """Returns the file of a group, and then those that it begins with (plain names in its `defaults`)."""
    path = _first_of(folders, name)
    bases = [
        base for base in read_yaml(path).get("defaults", []) if isinstance(base, str) and base != "_self_"
    ]
    return [path, *(inner for base in reversed(bases) for inner in _with_bases(folders, base))]


def _first_of(folders: Sequence[Path], name: str) -> Path:
    return next(path for folder in folders if (path := folder / f"{name}.yaml").is_file())


def _compose_files(chosen: dict[str, str], config_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    data = _load_files(chosen, config_dir)
    del data["hydra"]
    return data


def _load_files(chosen: dict[str, str], config_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    # Experiments lie beside the groups, so that a study's YAML and its README share a folder.
    arguments = [
        f"{EXPERIMENTS if group == 'experiment' else group}={name}" for group, name in chosen.items()
    ]
    roots = [*config_roots(config_dir), *experiment_roots(config_dir)]  # the first that has a file wins
    places = [("gemma2", f"file://{root}") for root in roots]
    try:
        config = load_configuration(
            [("hydra", "pkg://hydra.conf"), *places, ("schema", "structured://")], ROOT, arguments
        )
        data: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
        return data
    except MissingConfigException as error:
        wanted = f"the file {error.missing_cfg_file}.yaml" if error.missing_cfg_file else _one_line(error)
        hint = (
            f", {suggest(str(error.missing_cfg_file).split('/')[-1], error.options)}" if error.options else ""
        )
        raise UserError(f"the configuration asks for {wanted}, which does not exist{hint}.") from None
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the configuration cannot be composed: {_one_line(error)}.") from None


def _check_name(name: Any) -> None:
    """Raises UserError if the name given to a run is a path, which would put its folder elsewhere than runs/NAME."""
    if isinstance(name, str) and (name in (".", "..") or "/" in name or "\\" in name):
        raise UserError(
            f"name is {name}; accepted: text without / and \\ that is not . or ..; for another folder write output="
            f"{name}."
        )


def _resolved(data: dict[str, Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Sets values in `data`, and replaces what refers to others."""
    for key, value in values.items():
        _set(data, key, value)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{where}: {error.full_key} refers to something that is not there: {reason}."
        ) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _finish(data: dict[str, Any], values: dict[str, Any], where: str) -> RunConfig:
    resolved = _resolved(data, values, where)
    complaints = [f"{key} has no value yet; give one, as in {key}=…." for key in _missing(resolved)]
    try:
        config = build(RunConfig, resolved, where)
    except UserError as error:
        # What stands for a value that is missing is not also of a wrong type.
        complaints += [line for line in str(error).split("\n") if '"???"' not in line or not complaints]
    refuse(complaints)
    return config


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; whether it exists and fits is for the dataclasses to say."""
    *parents, last = key.split(".")
    inner = data
    for depth, parent in enumerate(parents):
        below = inner.setdefault(parent, {})
        if not isinstance(below, dict):
            above = ".".join(parents[: depth + 1])
            raise UserError(f"there is no key {key}, since {above} is a single value ({below}).")
        inner = below
    if isinstance(value, dict) and isinstance(inner.get(last), dict):
        for name, item in value.items():
            _set(inner[last], str(name), item)
    else:
        inner[last] = value


def _missing(data: dict[Any, Any], above: str = "") -> Iterable[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{above}{key}.")
        elif value == "???":
            yield f"{above}{key}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
