import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gemma2_jax.config import UserError
from gemma2_jax.data.config import ConversationsConfig, DataConfig
from gemma2_jax.data.conversations import from_document, to_document
from gemma2_jax.data.sources import open_documents

TURNS = [("user", "Hello"), ("model", "Hi!")]
MESSAGES = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
SHARE_GPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}
COMPLETION = {"prompt": "Hello", "completion": "Hi!"}
ALPACA = {"instruction": "Hello", "output": "Hi!"}
FORMATS = [MESSAGES, SHARE_GPT, COMPLETION, ALPACA]


def read(path: Path, skip_invalid: float = 0, **settings: Any) -> list[list[tuple[str, str]]]:
    source = open_documents((str(path),), "text", skip_invalid, ConversationsConfig(**settings))
    return [from_document(document) for document, _ in source]


def of(record: Any, folder: Path, **settings: Any) -> list[tuple[str, str]]:
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    (turns,) = read(folder / "a.jsonl", **settings)
    return turns


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("record", FORMATS, ids=lambda record: next(iter(record)))
def test_the_keys_decide_the_format(record: dict[str, Any], tmp_path: Path) -> None:
    assert of(record, tmp_path) == TURNS
    # Other keys do not matter, nor do those of later formats.
    assert of({"id": 5, "source": None, **record}, tmp_path) == TURNS
    assert of({**record, "messages": None} if record is not MESSAGES else record, tmp_path) == TURNS


def test_messages_go_before_a_prompt_of_the_same_record(tmp_path: Path) -> None:
    assert of({"prompt": "other", "completion": "other", **MESSAGES}, tmp_path) == TURNS


def test_share_gpt_with_roles_and_contents(tmp_path: Path) -> None:
    assert of({"conversations": MESSAGES["messages"]}, tmp_path) == TURNS


def test_the_input_follows_the_instruction(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert of(record, tmp_path) == [("user", "Add.\n\n1 and 2"), ("model", "3")]
    assert of({**record, "input": ""}, tmp_path) == [("user", "Add."), ("model", "3")]


@pytest.mark.parametrize("compressed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_every_kind_of_file(kind: str, compressed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{compressed}"
    records = [MESSAGES, messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    if kind == ".parquet":
        pytest.importorskip("pyarrow", reason="needs the extra `parquet`")
        import pyarrow
        from pyarrow import parquet

        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, **record} for record in records]), buffer)
        content = buffer.getvalue().to_pybytes()
    else:
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
    compress: Any = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[compressed]
    path.write_bytes(compress(content))
    assert read(path) == [TURNS, [("user", "a"), ("model", "b"), ("user", "c"), ("model", "d")]]


def test_columns_of_parquet_without_a_conversation_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra `parquet`")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "id": 1}]), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet: no conversation \(its keys are text, id\); accepted: mess"
    ):
        read(tmp_path / "a.parquet")
    rows = [ALPACA, {"instruction": None, "output": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet, row 2: no conversation \(its keys are instruction, output\)"
    ):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a", "id": 1}, r"no conversation \(its keys are text, id\); accepted: messages, conversations,"),
        ({}, r"no conversation \(its keys are none\)"),
        ({"messages": "Hello"}, r"messages holds str; it must be a list of messages"),
        ({"messages": []}, r"a conversation without messages"),
        ({"messages": ["Hello"]}, r"a message is not an object \(messages\[0\] is str\)"),
        (
            {"messages": [{"role": "user", "text": "a"}]},
            r"a message of unknown keys \(messages\[0\] has role, text\); accepted: role and content, or from and",
        ),
        (messages(("user", "a"), ("tool", "b")), r"an unknown role \(messages\[1\] has 'tool'\); accepted: system,"),
        (messages(("user", None)), r"a content that is not text \(messages\[0\]\.content holds NoneType\)"),
        (messages(("user", ["a"])), r"a content that is not text \(messages\[0\]\.content holds list\)"),
        ({"prompt": "a", "completion": 5}, r"a content that is not text \(completion holds int\)"),
        (
            messages(("user", "a"), ("user", "b")),
            r"roles that do not alternate \(turn 2 of 2 is user after user\); accepted: user, model, user, model",
        ),
        (messages(("assistant", "a")), r"roles that do not alternate \(turn 1 of 1 is model\)"),
        (
            messages(("user", "a"), ("system", "b"), ("assistant", "c")),
            r"roles that do not alternate \(turn 2 of 3 is system after user\)",
        ),
        (messages(("user", "a")), r"a conversation without a turn of the model"),
        (
            messages(("system", "a"), ("user", "b"), ("assistant", "c")),
            r"a system turn, which .* lacks; data\.conversations\.system=fold puts its text before the first user",
        ),
        ({**ALPACA, "system": "a"}, r"a system turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            r"a message with weight 0 \(messages\[1\]\)",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            r"a message with a call of a tool \(messages\[1\] has tool_calls\)",
        ),
        (messages(("user", "\ud800"), ("assistant", "")), r"the text contains a lone surrogate"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_place(
    record: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(MESSAGES) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {sentence}") as caught:
        read(path)
    assert str(caught.value).endswith("data.skip_invalid=N leaves out up to N such records.")
    assert read(path, skip_invalid=1) == [TURNS]


@pytest.mark.parametrize(
    "record", [MESSAGES, SHARE_GPT, COMPLETION, ALPACA], ids=lambda record: next(iter(record))
)
def test_a_system_turn_is_folded_into_the_first_user_turn(record: dict[str, Any], tmp_path: Path) -> None:
    folded = [("user", "Be kind.\n\nHello"), ("model", "Hi!")]
    assert of({**record, "system": " Be kind.\n"}, tmp_path, system="fold") == folded
    assert of({**record, "system": " "}, tmp_path) == TURNS
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in record:
            turns = [{role: "system", content: "Be kind. "}, *record[key]]
            assert of({key: turns}, tmp_path, system="fold") == folded


def test_a_system_turn_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"turn 1 of 2 is system"):
        of(messages(("system", "a"), ("assistant", "b")), tmp_path, system="fold")


def test_contents_are_trimmed_as_in_the_published_template(tmp_path: Path) -> None:
    assert of(messages(("user", "\n Hello\u2003"), ("assistant", "\tHi!\n")), tmp_path) == TURNS


def test_text_files_hold_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(UserError, match=r"a\.txt: a text file; accepted: \.jsonl, \.parquet, each"):
        read(tmp_path / "a.txt")
    with pytest.raises(
        UserError, match=r"b' matches no file; accepted: globs of \.jsonl, \.parquet files, each"
    ):
        read(tmp_path / "b")


def test_the_built_in_corpus_holds_no_conversations(data: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.source is python-docs, which holds no conversations"):
        DataConfig("python-docs", data.folder, 0.1, 32, 4, 0, conversations=ConversationsConfig())


@given(
    st.lists(st.tuples(st.sampled_from(["user", "model"]), st.text(st.characters(exclude_categories=["Cs"]))))
)
def test_documents_keep_the_turns(turns: list[tuple[str, str]]) -> None:
    assert from_document(to_document(turns)) == turns
