"""Building configuration from plain data: accepted values, and one-sentence errors for others."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma2_jax.config import (
    UserError,
    build,
    check_place,
    load_config,
    read_yaml,
    save_config,
    suggest,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True)
class Speed:
    kind: Literal["slow", "fast"]
    most: float = 1.0

    def __post_init__(self) -> None:
        if self.most < 0:
            raise UserError(f"most is {self.most}; it must not be negative.")


@dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5
    kind: Literal["flat", "round"] = "flat"
    files: str | tuple[str, ...] = "a.txt"
    window: int | None = None
    speed: "float | Speed" = 1.0
    on: bool = False

    def __post_init__(self) -> None:
        if self.width % 2:
            raise UserError(f"inner.width is {self.width}; it must be even.")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)
    listed: tuple[Speed, ...] = ()


def test_nested_data_becomes_nested_dataclasses():
    data = {
        "inner": {"width": 2, "rate": 3, "files": ["x", "y"], "window": 4, "on": True},
        "named": {"a": {"width": 4}},
    }
    built = build(Outer, data, "here")
    assert built == Outer(Inner(2, 3.0, files=("x", "y"), window=4, on=True), named={"a": Inner(4)})
    assert isinstance(built.inner.rate, float)
    assert isinstance(built.inner.files, tuple)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"inner": {"width": True}}, "here: inner.width is true; accepted: a whole number."),
        ({"inner": {"width": 2.0}}, "here: inner.width is 2.0; accepted: a whole number."),
        ({"inner": {"width": "2"}}, 'here: inner.width is "2"; accepted: a whole number.'),
        ({"inner": {"width": 2, "rate": "fast"}}, 'here: inner.rate is "fast"; accepted: a number.'),
        ({"inner": {"width": 2, "rate": True}}, "here: inner.rate is true; accepted: a number."),
        ({"inner": {"width": 2, "rate": float("nan")}}, "here: inner.rate is NaN; accepted: a number."),
        ({"inner": {"width": 2, "kind": "flatt"}}, 'here: inner.kind is "flatt"; accepted: flat or round.'),
        ({"inner": {"width": 2, "files": 3}}, "here: inner.files is 3; accepted: text or a list of text."),
        ({"inner": {"width": 2, "files": ["a", 3]}}, "accepted: text or a list of text."),
        (
            {"inner": {"width": 2, "window": "x"}},
            'here: inner.window is "x"; accepted: a whole number or null.',
        ),
        ({"inner": {"width": 2, "on": 1}}, "here: inner.on is 1; accepted: true or false."),
        ({"inner": 3}, "here: inner is 3; accepted: keys width, rate, kind, files, window, speed, on."),
        (
            {"inner": {"width": 2, "speed": "x"}},
            'here: inner.speed is "x"; accepted: a number or keys kind, most.',
        ),
        (
            {"inner": {"width": 2, "speed": {"kind": "x"}}},
            'here: inner.speed.kind is "x"; accepted: slow or fast.',
        ),
        ({"inner": {"width": 2, "speed": {}}}, "here: inner.speed.kind is missing; accepted: slow or fast."),
        (
            {"inner": {"width": 2, "speed": {"knd": "slow"}}},
            "here: there is no key inner.speed.knd, did you mean kind (accepted: kind, most).",
        ),
        (
            {"inner": {"width": 2, "speed": {"kind": "slow", "most": -1}}},
            "here: most is -1.0; it must not be",
        ),
        ({}, "here: inner is missing; accepted: keys width, rate"),
        ({"inner": {}}, "here: inner.width is missing; accepted: a whole number."),
        (
            {"inner": {"widht": 2}},
            "here: there is no key inner.widht, did you mean width (accepted: files, kind,",
        ),
        (
            {"iner": {"width": 2}},
            "here: there is no key iner, did you mean inner (accepted: inner, listed, named, other).",
        ),
        ({"inner": {"width": 2}, "other": {"xyz": 2}}, "here: there is no key other.xyz, accepted: files,"),
        (
            {"inner": {"width": 2}, "named": {"a": {"width": "x"}}},
            'named.a.width is "x"; accepted: a whole number.',
        ),
        ({"inner": {"width": 2}, "named": {"a": 5}}, "here: named.a is 5; accepted: keys width"),
        (
            {"inner": {"width": 2}, "listed": [{"kind": "slow"}, {"knd": "slow"}]},
            "here: there is no key listed[1].knd, did you mean kind (accepted: kind, most).",
        ),
        (
            {"inner": {"width": 2}, "listed": [{"kind": "x"}]},
            'here: listed[0].kind is "x"; accepted: slow or fast.',
        ),
        ({"inner": {"width": 2}, "listed": [5]}, "here: listed[0] is 5; accepted: keys kind, most."),
        ({"inner": {"width": 2}, "listed": 5}, "here: listed is 5; accepted: a list of keys kind, most."),
        ({"inner": {"width": 3}}, "here: inner.width is 3; it must be even."),
        ({"inner": {"width": object()}}, "here holds a value that is not plain data"),
        (
            {"inner": {"width": 10**400}},
            "here: inner.width is a whole number of more than 18 digits; accepted:",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(data, sentence):
    with pytest.raises(UserError) as caught:
        build(Outer, data, "here")
    assert sentence in str(caught.value)
    hint = "Write it in quotes for text: '3'."  # only where text is accepted and a number given
    assert (hint in str(caught.value)) == (data == {"inner": {"width": 2, "files": 3}})
    assert "in quotes" not in str(caught.value).replace(hint, "")
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_all_mistakes_are_reported_together_one_per_line():
    data = {"inner": {"widht": 2, "rate": "x"}, "named": {"a": {"width": 3}}, "othr": 1}
    with pytest.raises(UserError) as caught:
        build(Outer, data, "here")
    first, *lines = str(caught.value).split("\n")
    assert first == "here:"
    beginnings = [
        "there is no key inner.widht,",
        "there is no key othr,",
        'inner.rate is "x";',
        "inner.width is 3;",
    ]
    for beginning in beginnings:
        assert sum(line.strip().startswith(beginning) for line in lines) == 1
    assert len(lines) == 4  # inner.width is not missing as well


def test_saved_and_loaded_is_equal(tmp_path):
    config = Outer(Inner(2, 1e-5, files=("é", "b: c"), window=None), named={"x": Inner(4, on=True)})
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(Outer, tmp_path / "new" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]
    assert build(Outer, to_dict(config), "here") == config


# What could be text, number, date or null; and every text that UTF-8 can express.
YAML_LIKE = st.one_of(
    st.from_regex(r"[-+]?[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?", fullmatch=True),
    st.sampled_from(
        ["null", "~", "yes", "2026-01-01", "0x1f", "1:30", ".inf", "=", "<<", "- a", "a: b", "#"]
    ),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@given(text=YAML_LIKE, name=YAML_LIKE)
@example(text="1e5", name="1E-5")
@example(text="null", name="\x85")
@example(text="a\r\nb\u2028\x85 \ufeff", name="\t\0")
def test_every_text_is_saved_and_loaded_as_text(tmp_path_factory, text, name):
    config = Outer(Inner(2, files=text), named={name: Inner(4, files=(text, name))})
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    save_config(config, path)
    assert load_config(Outer, path) == config
    assert path.read_text() == to_yaml(config)


def test_an_exponent_without_a_point_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("inner: {width: 2, rate: 1e-3}\n")
    assert load_config(Outer, tmp_path / "c.yaml").inner.rate == 1e-3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n", "holds [1] where keys and values are expected."),
        (b"", "is empty; keys and values are expected."),
        (b" \n# a comment\n", "is empty; keys and values are expected."),
        (b"null\n", "holds null where keys and values are expected."),
        (b"\xff\xfe", "is not a text file in UTF-8."),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content, sentence):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


def test_suggestion_names_the_nearest_first():
    assert suggest("widht", ["height", "width"]) == "did you mean width (accepted: height, width)"
    assert suggest("zzz", ["height", "width"]) == "accepted: height, width"
    assert suggest("zzz", []) == "accepted: none"


def test_the_root_is_a_place() -> None:
    check_place("output", "/")


@pytest.mark.parametrize(
    "path", ["file/x", "new/../file/x", "new/deep/../../file", "here/../file/x", "file/../x"]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_on_the_way_to_a_folder_is_named(path, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    whole = tmp_path / path if absolute else Path(path)
    with pytest.raises(
        UserError, match=r"^output is .*, which cannot be used: \S*file is a file, where a folder"
    ):
        check_place("output", whole)
    with pytest.raises(OSError, match=r"File exists|Not a directory"):  # what the run would meet
        whole.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("path", ["new/x", "new/../x", "link/../beside/x", "here/../new/../here/x", "new/.."])
def test_folders_that_can_be_made_are_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside").touch()  # link/.. is the folder above the target
    (tmp_path / "far" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/target")
    (tmp_path / "here").mkdir()
    check_place("output", path)
    Path(path).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("path", ["locked/x", "new/../locked/x", "locked/new/../../x"])
def test_a_folder_in_which_nothing_can_be_made_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path / "locked")
    check_place("output", "locked")
    with pytest.raises(UserError, match=f"^output is {path}, .*: nothing can be made in {tmp_path}/locked "):
        check_place("output", path)
