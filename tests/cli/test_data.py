"""The verbs data and tokenizer on a few small files."""

import argparse
import ast
import inspect
import io
import json
import re
import shutil

import pytest

from gemma2_jax.cli.main import main


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """A prepared folder of real text, cut into documents, as the arguments that name it."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = inspect.getsource(argparse).split("\n\n")
    for number in range(0, len(paragraphs), 8):
        (folder / f"{number:04}.txt").write_text(
            "\n\n".join(paragraphs[number : number + 8]), encoding="utf-8"
        )
    arguments = [
        "data=files",
        f"data.source={folder}/*.txt",
        f"data.folder={folder}/prepared",
        "data.validation_fraction=0.2",
        "data.seq_len=64",
        "data.batch_size=4",
        "data.workers=1",
        "tokenizer.vocab_size=600",
    ]
    assert main(["data", "prepare", *arguments]) == 0
    return arguments


def test_what_was_prepared_is_shown(overrides, capsys):
    assert main(["data", "show", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "validation" in shown
    assert len(re.findall(r"^ +\d+  ['\"]", shown, re.MULTILINE)) == 4  # the rows of a batch


@pytest.mark.parametrize(
    ("given", "rows"), [([], 4), (["--rows", "2"], 2), (["--rows=100"], 16), (["--rows", "0"], 0)]
)
def test_few_rows_are_shown_by_default(overrides, capsys, given, rows):
    assert main(["data", "show", *overrides, "data.batch_size=16", *given]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+  ['\"]", shown, re.MULTILINE)) == rows
    assert f"{rows} of the first training batch's 16 rows" in shown
    assert ("--rows 16 shows all" in shown) == (rows < 16)


@pytest.fixture(scope="module")
def chat_overrides(tmp_path_factory):
    """Prepared conversations, as the arguments that name them."""
    folder = tmp_path_factory.mktemp("chats")
    chats = [
        {"prompt": f"Who is {name}?", "completion": f"This is {name}. <end_of_turn>"}
        for name in "abcdefghijkl"
    ]
    long = {"prompt": "What is long?", "completion": " ".join(map(str, range(400)))}
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in [*chats, long]))
    arguments = [
        "data=conversations",
        f"data.source={folder}/*.jsonl",
        f"data.folder={folder}/prepared",
        "data.validation_fraction=0.2",
        "data.seq_len=512",
        "data.batch_size=2",
        "data.workers=1",
    ]
    assert main(["data", "prepare", *arguments]) == 0
    return arguments


def test_what_carries_loss_is_marked(chat_overrides, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert main(["data", "show", *chat_overrides]) == 0
    head, *rows = re.split(r"^row \d: ", capsys.readouterr().out, flags=re.MULTILINE)
    assert "2 of the first training batch's 2 rows: conversations, loss in « »" in head
    assert re.search(
        r"1 of \d+ conversations to train on are longer than data.seq_len \(512\) and truncated", head
    )
    assert len(rows) == 2
    exchange = (
        r"<start_of_turn>user\nWho is (.)\?<end_of_turn>\n"
        r"<start_of_turn>model\n«This is (.)\. <end_of_turn><end_of_turn>»\n\n"
    )
    cut = r"<start_of_turn>user\nWhat is long\?<end_of_turn>\n<start_of_turn>model\n«0 1 2 [\d ]+»\n"
    announced = r"(\d+) conversations? of (\d+) tokens, (\d+) with loss, (\d+) of padding\n"
    for row in rows:
        shown = re.fullmatch(rf"{announced}((?:{exchange}|{cut})+)(?:… and (\d+) more\n)?", row)
        assert shown, row
        conversations, tokens, loss, padding = (int(shown[n]) for n in range(1, 5))
        assert tokens + padding == 512
        assert 0 < loss < tokens
        assert shown[5].count("«") == min(conversations, 3)
        assert int(shown[8] or 0) == max(conversations - 3, 0)
        found = re.findall(exchange, shown[5])
        assert all(question == answer for question, answer in found)
    assert any("Who is" in row for row in rows)
    assert any("long" in row for row in rows)


def test_in_a_terminal_what_carries_loss_is_coloured(chat_overrides, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", "show", *chat_overrides]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\x1b\[1;32mThis is (.)\. <end_of_turn><end_of_turn>\x1b\[0m", shown)
    assert re.search(r"\x1b\[2mWho is .\?<end_of_turn>\x1b\[0m", shown)
    assert "«" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "show", *chat_overrides]) == 0
    assert "«This is" in capsys.readouterr().out


def test_shards_are_verified(overrides, tmp_path, capsys):
    (prepared,) = [text.removeprefix("data.folder=") for text in overrides if text.startswith("data.folder=")]
    folder = tmp_path / "copied"
    shutil.copytree(prepared, folder)
    assert main(["data", "verify", *overrides, f"data.folder={folder}"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0] == f"{folder}: 2 shards were read; all match their checksums."
    assert re.fullmatch(r".*: data\.source \[.*\] has the content that was prepared\.", output[1])

    shard = folder / "validation-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["data", "verify", *overrides, f"data.folder={folder}"]) == 1
    output = capsys.readouterr().err
    assert f"{shard} has changed since it was written" in output
    assert len([line for line in output.splitlines() if not line.endswith("…")]) == 1


def test_a_source_is_verified_where_it_is(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text(
        "\n\n".join(f"{number} phone 555-0199. " * 200 for number in range(9))
    )
    arguments = [
        "data=files",
        f"data.source={tmp_path}/notes.txt",
        f"data.folder={tmp_path}/prepared",
        "data.validation_fraction=0",
        "data.workers=1",
        "tokenizer.vocab_size=300",
    ]
    assert main(["data", "prepare", *arguments]) == 0
    (tmp_path / "notes.txt").write_text((tmp_path / "notes.txt").read_text().replace("555-0199", "XXX-XXXX"))
    capsys.readouterr()
    assert main(["data", "verify", *arguments]) == 1
    assert re.search(r"has changed since .* was prepared \(.*notes\.txt\); delete", capsys.readouterr().err)
    (tmp_path / "notes.txt").unlink()
    assert main(["data", "verify", *arguments]) == 0
    assert "was not found, so its content was not compared" in capsys.readouterr().out


def test_what_was_left_out_is_shown(tmp_path, capsys):
    lines = [f'{{"text": "{number} phone 555-0199. "}}' for number in range(200)]
    (tmp_path / "notes.jsonl").write_text("\n".join([*lines, "{"]))
    arguments = [
        "data=files",
        f"data.source={tmp_path}/*",
        f"data.folder={tmp_path}/prepared/data",
        "data.validation_fraction=0",
        "data.workers=1",
        "data.skip_invalid=0.01",
        "data.seq_len=16",
        "tokenizer.vocab_size=300",
    ]
    assert main(["data", "prepare", *arguments]) == 0
    assert main(["data", "show", *arguments]) == 0
    left_out = (
        f"skipped: 1 invalid records of 201 (not valid JSON: 1; first: {tmp_path}/notes.jsonl, line 201)"
    )
    assert left_out in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc/x", "{file}", "{file}/x/y"])
@pytest.mark.parametrize("key", ["data.folder", "tokenizer.path"])
def test_a_path_that_is_not_writable_is_reported(key, folder, overrides, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = folder.format(file=tmp_path / "file")
    own = ["tokenizer.vocab_size=600", f"data.folder={tmp_path}/prepared", f"{key}={place}"]
    assert main(["data", "prepare", *overrides, *own]) == 1
    output = capsys.readouterr().err
    assert place in output
    assert len([line for line in output.splitlines() if not line.endswith("…")]) == 1


def test_the_tokenizer_is_trained_once(overrides, capsys):
    assert main(["tokenizer", "train", *overrides]) == 0
    assert "has 600 tokens" in capsys.readouterr().out
    assert main(["tokenizer", "show", *overrides]) == 0
    assert "tokens        600\n" in capsys.readouterr().out


def test_encoded_and_decoded_is_the_same(overrides, capsys):
    text = "def parse(self):\n    return 12"
    assert main(["tokenizer", "encode", text, *overrides]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert "".join(ast.literal_eval(piece) for _, piece in rows) == text.replace(" ", "▁")
    assert main(["tokenizer", "decode", " ".join(number for number, _ in rows), *overrides]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_input_that_is_not_utf8_is_reported(overrides, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 x"), encoding="utf-8"))
    assert main(["tokenizer", "encode", "-", *overrides]) == 1
    assert capsys.readouterr().err.startswith(
        "gemma2: the standard input is not UTF-8 (it has an invalid byte 0xe9)"
    )


@pytest.mark.parametrize(
    "given", [["74", "75"], ["74 75"], ["74,", "75"], ["[74, 75]"], ["-"]], ids=lambda given: " ".join(given)
)
def test_ids_are_decoded_however_they_are_given(overrides, capsys, monkeypatch, given):
    monkeypatch.setattr("sys.stdin", io.StringIO("74\n75\n"))
    assert main(["tokenizer", "decode", "74 75", *overrides]) == 0
    text = capsys.readouterr().out
    assert len(text) > 1
    assert main(["tokenizer", "decode", *given, *overrides]) == 0
    assert capsys.readouterr().out == text


def test_the_bytes_of_a_character_are_shown_one_by_one(overrides, capsys):
    assert main(["tokenizer", "encode", "λ", *overrides]) == 0
    pieces = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert pieces == ["'<0xCE>'", "'<0xBB>'"]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["tokenizer", "decode", "12 x"], "'x' is not a token id; accepted: whole numbers"),
        (
            ["tokenizer", "encode", "def", "add"],
            "'add' is a second argument; put a text with blanks in quotes",
        ),
        (["tokenizer", "decode", "-1"], "'-1' is not a token id; accepted: whole numbers"),
        (["data", "show", "--rows", "-2"], "--rows is -2; it must be at least 0."),
        (
            ["tokenizer", "decode", "[]"],
            "there is no token id to decode; accepted: whole numbers, as in 417 89,",
        ),
        (
            ["tokenizer", "decode", ""],
            "there is no token id to decode; accepted: whole numbers, as in 417 89,",
        ),
        (["tokenizer", "decode"], "there is no token id to decode; accepted: whole numbers, as in 417 89,"),
        (["tokenizer", "decode", "600"], "Token id 600 is not in"),
        (["tokenizer", "show", "tokenizer.path=nowhere.model"], "nowhere.model cannot be read"),
        (["data", "show", "data.folder=nowhere"], "nowhere"),
        (["data", "prepare", "data.text_field=body"], "data.text_field"),
    ],
)
def test_a_mistake_is_reported(overrides, command, sentence, capsys):
    words = [text for text in command if "=" not in text]
    assert main([*words, *overrides, *(text for text in command if "=" in text)]) == 1
    output = capsys.readouterr().err
    assert sentence in output
    assert len([line for line in output.splitlines() if not line.endswith("…")]) == 1
