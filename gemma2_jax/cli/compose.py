"""Composes configurations from YAML groups, experiments and key=value overrides, with Hydra (and `hydra_private`).

    from gemma2_jax.cli.compose import compose
    config = compose(["experiment=quickstart/teacher", "training.steps=100"])

Hydra composes the files (groups, an experiment) and parses the overrides. Their values are then set on the result and
checked by the dataclasses, so that a wrong key or value gives the same message wherever it came from.
"""

import dataclasses
import itertools
import math
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
from gemma2_jax.messages import one_line
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.space import MOST_TRIALS

ROOT = "train"  # the name of the root file, configs/train.yaml
COMMAND_LINE = "the configuration"

# ${or:${key},other} in a YAML file: the key's value, or `other` if that is null.
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
        config_dir: user's folder with groups and experiments; its files take precedence over ours.
        values: further values by dotted key, set last and unchanged.

    Raises:
        UserError: an override is not key=value, a group has no such name, or `build` refuses the result.
    """
    if isinstance(overrides, str):  # its letters would be the overrides
        raise UserError(f"overrides is the text {overrides!r}; it must be a list, as in [{overrides!r}].")
    chosen, given = _chosen(overrides, config_dir)
    _check_name(given.get("name"))  # names in files may contain /, such as quickstart/teacher
    return _finish(_compose_files(chosen, config_dir), {**given, **(values or {})}, COMMAND_LINE)


def composed_values(
    overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Returns the values of files and overrides as `compose` sees them, unchecked and without the code's defaults.

    Raises:
        UserError: an override is not key=value or names an unknown key, or a group has no such name.
    """
    chosen, given = _chosen(overrides, config_dir)
    for key in given:
        if type_of(RunConfig, key) is None:
            raise UserError(f"there is no key {key}, {suggest(key, keys())}.")
    return _resolved(_compose_files(chosen, config_dir), given, COMMAND_LINE)


def compose_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the configuration saved at `path` (a run's config.yaml), changed by `key=value` overrides."""
    chosen, values = _split(overrides)
    if chosen:
        group = next(iter(chosen))
        raise UserError(
            f"{group}={chosen[group]} chooses a config file, but {path} is already composed; "
            "set single keys, as in training.steps=100."
        )
    _check_name(values.get("name"))
    return _finish(read_yaml(path), values, str(path))


def combinations(overrides: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Separates the overrides that list several values from those with one value.

    Returns:
        All combinations of the listed values, the last key changing fastest (`["a=1,2", "c=x,y"]` gives
        `{"a": "1", "c": "x"}`, `{"a": "1", "c": "y"}`, …; one empty combination if no key lists values), and the
        other overrides unchanged. Lists are Hydra's choices (`a=1,2`) and ranges (`a=range(1,4)`).
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
            texts = list(itertools.islice(override.sweep_string_iterator(), MOST_TRIALS + 1))
            lists.append([(override.key_or_group, text) for text in texts])
            if math.prod(map(len, lists)) > MOST_TRIALS:
                raise UserError(
                    f"the lists of values up to {override.input_line} have more than {MOST_TRIALS:,} combinations, "
                    "which is the most of a sweep; list fewer values."
                )
        else:
            raise UserError(
                f"{override.input_line} is not a list of values; accepted: key=A,B or key=range(1,4)."
            )
    return [dict(combination) for combination in itertools.product(*lists)], shared


def pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns the key and the value of each override, in order; names and text values are kept as typed.

    Raises:
        UserError: an override lists several values.
    """
    found = []
    for override in _parse(overrides):
        key, _, text = str(override.input_line).partition("=")
        if override.is_sweep_override():
            raise UserError(
                f"{key}={text} lists several values, which only `gemma2 sweep` accepts{_as_list(key, text)}."
            )
        # The value of a group is a file's name. Unknown keys are refused later, with the value as parsed.
        kind = str if key in groups() else type_of(RunConfig, key)
        found.append((override.key_or_group, as_typed(kind, override.value(), text)))
    return found


def _as_list(key: str, text: str) -> str:
    """Returns the end of a sentence: how to write a list, if the key takes one; else an empty text."""
    accepts_list = any(get_origin(option) in (tuple, list) for option in options_of(type_of(RunConfig, key)))
    return f"; to give one list, write '{key}=[{text}]'" if accepts_list else ""


@cache
def groups() -> tuple[str, ...]:
    """Returns the names of the config groups: `experiment`, and every section of a run's configuration."""
    hints = get_type_hints(RunConfig)
    parts = [
        field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[field.name])
    ]
    return ("experiment", *parts)


@cache
def keys() -> tuple[str, ...]:
    """Returns every dotted key of a run's configuration, in order, without the sections that are always present."""
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
        # The shell splits `key= value` in two; its first part looks like an empty value.
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
    """Quotes the value of a text key, so that the grammar accepts blanks and letters of any language."""
    key, _, value = text.partition("=")
    takes_text = str in options_of(type_of(RunConfig, key))
    quote = next((quote for quote in "'\"" if quote not in value), None)
    plain = value != "" and value[0] not in "'\"[{ " and value[-1] not in "\\ "
    return f"{key}={quote}{value}{quote}" if takes_text and quote is not None and plain else text


def _lacks_utf8(text: str) -> bool:
    """Returns whether an argument has bytes that Python could not decode and kept as lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _unreadable(overrides: Sequence[str], position: int) -> str:
    """Returns the message for an override that is not key=value; the shell splits `key = value` into three pieces."""
    text = overrides[position]
    if _lacks_utf8(text):
        return f"{text!r} is not UTF-8; if your locale does not use UTF-8, set LC_ALL=C.UTF-8."
    pieces = " ".join(overrides[position : position + 3])
    spaced = re.match(r"([A-Za-z_][\w.]*)(?: *= *|: +)([^\s=]+)", pieces)
    if spaced is not None and " " in spaced[0]:
        return f"{spaced[0]!r} cannot be read; write it without blanks: {spaced[1]}={spaced[2]}."
    return (
        f"{text!r} cannot be read; accepted: key=value, as in training.steps=100, "
        "with quotes around a value with blanks or special characters, as in 'name=\"a b\"'."
    )


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Separates the overrides that choose a file from those that set a value."""
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
    """Returns what `_split` returns. Raises UserError for a name that its group does not have."""
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
    """Returns the files that a configuration is composed from, in order of precedence, each with its section.

    The section is the prefix of the file's keys: `model` for a file of that group, `distill.model` if that file gives
    the teacher's sizes, and empty for the root file and experiments, which set keys of all sections.
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
    """Returns the file of a group, then the files that it is based on (plain names in its `defaults`)."""
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
    # Experiments are outside configs/, so that a study's YAML files and its README share a folder.
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
        missing = f"the file {error.missing_cfg_file}.yaml" if error.missing_cfg_file else one_line(error)
        hint = (
            f", {suggest(str(error.missing_cfg_file).split('/')[-1], error.options)}" if error.options else ""
        )
        raise UserError(f"the configuration refers to {missing}, which does not exist{hint}.") from None
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the configuration cannot be composed: {one_line(error)}.") from None


def _check_name(name: Any) -> None:
    """Raises UserError if a run's name is a path, since its folder would then not be runs/NAME."""
    if isinstance(name, str) and (name in (".", "..") or "/" in name or "\\" in name):
        raise UserError(
            f"name is {name}; accepted: text without / and \\, except . and ..; to choose the run's folder, use "
            f"output={name}."
        )


def _resolved(data: dict[str, Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Sets values in `data`, and resolves its references (${...})."""
    for key, value in values.items():
        _set(data, key, value)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{where}: {error.full_key} has a reference that cannot be resolved: {reason}."
        ) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _finish(data: dict[str, Any], values: dict[str, Any], where: str) -> RunConfig:
    resolved = _resolved(data, values, where)
    problems = [f"{key} has no value; set it with {key}=…." for key in _missing(resolved)]
    try:
        config = build(RunConfig, resolved, where)
    except UserError as error:
        # A missing value (???) is not reported again as a value of the wrong type.
        problems += [line for line in str(error).split("\n") if '"???"' not in line or not problems]
    refuse(problems)
    return config


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; the dataclasses check later whether it exists and fits."""
    *parents, last = key.split(".")
    inner = data
    for depth, parent in enumerate(parents):
        below = inner.setdefault(parent, {})
        if not isinstance(below, dict):
            above = ".".join(parents[: depth + 1])
            raise UserError(
                f"there is no key {key}, since {above} is a single value ({below}), not a section."
            )
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
