import builtins
import errno
import gzip
import hashlib
import io
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gemma2_jax.config import UserError
from gemma2_jax.data import reading
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.python_docs import PythonDocs
from gemma2_jax.data.sources import open_documents
from tests.data.files import jsonl, parquet_bytes, parquet_of_bytes, zstandard_frame

TEXTS = ["First, with an é.\nTwo lines.\n", "Second 😀", "Third"]


def documents(pattern: str | Path, text_field: str = "text") -> list[str]:
    return [text for text, _ in open_documents((str(pattern),), text_field)]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    # Two frames, as tools that append write them.
    ".zst": lambda content: b"".join(zstandard.compress(half) for half in (content[:9], content[9:])),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("kind", "write"), [(".jsonl", jsonl), (".parquet", parquet_bytes)])
def test_structured_files(tmp_path: Path, kind: str, write: Callable[[list[Any]], bytes], compression: str):
    (tmp_path / f"file{kind}{compression}").write_bytes(COMPRESSIONS[compression](write([*TEXTS, "", " \n"])))
    assert documents(tmp_path / f"*{kind}*") == TEXTS  # blank documents are none


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".rst", ".TXT"])
def test_short_text_files_are_one_document_each(tmp_path: Path, kind: str, compression: str):
    content = "\ufeffCarriage\r\n\nreturns stay; the byte order mark does not".encode()
    (tmp_path / f"file{kind}{compression}").write_bytes(COMPRESSIONS[compression](content))
    assert documents(tmp_path / "*") == [content.decode("utf-8-sig")]


def paragraphs(count: int) -> list[str]:
    """Of 10 to 2,000 characters, with one or more blank lines after each."""
    draw = random.Random(0)
    return [
        f"{number}é " + "word\nline " * draw.randrange(200) + draw.choice(["\n\n", "\r\n\r\n", "\n \n\n"])
        for number in range(count)
    ]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_files_are_cut_at_blank_lines(tmp_path: Path, compression: str):
    written = paragraphs(100)
    content = "".join(written).encode()
    (tmp_path / f"file.txt{compression}").write_bytes(COMPRESSIONS[compression](content))
    cut = documents(tmp_path / "file*")
    assert "".join(cut).encode() == content
    assert all(4000 <= len(text) <= 4000 + max(map(len, written)) for text in cut[:-1])
    assert all(any(text.startswith(start) for start in written) for text in cut)  # no paragraph is divided


def test_a_text_file_shorter_than_a_document_stays_whole(tmp_path: Path):
    text = "A paragraph.\n\n" * 280  # 3,920 characters
    (tmp_path / "file.md").write_text(text)
    assert documents(tmp_path / "file.md") == [text]


def test_a_long_paragraph_is_cut_at_the_ends_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 20)
    (tmp_path / "file.txt").write_text("12345678\n12345678\n12345678\nrest\n\nnext")
    assert documents(tmp_path / "file.txt") == ["12345678\n12345678\n", "12345678\nrest\n\nnext"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_endless_line_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
):
    monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 10)
    text = "aé😀" * 50 + "\nend"
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / f"file.txt{compression}").write_bytes(COMPRESSIONS[compression](content))
    cut = documents(tmp_path / "file*")
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 10


def test_an_endless_line_is_read_in_pieces(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"x" * 40_000_000)
    tracemalloc.start()
    try:
        lengths = [len(text) for text, _ in open_documents((str(path),), "text")]
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert lengths == [1_000_000] * 40


def test_one_text_file_gives_both_splits(tmp_path: Path):
    draw = random.Random(0)
    words = [f"{first}{last}" for first in ("lo", "ka", "min", "se") for last in ("ra", "tu", "vel", "pi")]
    text = "\n\n".join(" ".join(draw.choices(words, k=80)) + "." for _ in range(470))
    assert 190_000 < len(text) < 210_000
    (tmp_path / "book.txt").write_text(text)
    data = DataConfig(
        source=str(tmp_path / "book.txt"),
        folder=str(tmp_path / "prepared"),
        validation_fraction=0.05,
        seq_len=32,
        batch_size=4,
        seed=0,
        workers=1,
    )
    manifest = prepare(data, TokenizerConfig(str(tmp_path / "book.model"), vocab_size=300))
    assert manifest.train.documents > 40
    assert manifest.validation.documents > 0
    assert manifest.train.characters + manifest.validation.characters == len(text)


def test_globs_are_recursive_sorted_and_count_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.txt", "a/c.txt", "a/d/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_documents(("~/**/*.txt", f"{tmp_path}/a/*.txt"), "text")
    assert [text for text, _ in source] == ["a/c.txt", "a/d/a.txt", "b.txt"]
    assert [done for _, done in source][-1] == source.size


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text"\n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: not a JSON object"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"a\.jsonl, line 1: no text in the field 'text'.*\(.*body, id\)",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: the field 'text' holds int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: the text contains a lone surrogate"),
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt, line 2: not valid UTF-8 \(byte 0xff at 4\)"),
        ("a.txt", b"fine\ncut off \xc3", r"a\.txt, line 2: not valid UTF-8 \(byte 0xc3 at 8\)"),
        ("a.txt", b"x\n" + b"y" * 1_500_000 + b"\xff", r"line 2: not valid UTF-8 \(byte 0xff at 1500000\)"),
        ("a.txt", b"y" * 999_999 + b"\xc3", r"line 1: not valid UTF-8 \(byte 0xc3 at 999999\)"),
        ("a.jsonl", b'{"text": "x"}\n\xc3', r"a\.jsonl, line 2: not valid UTF-8 \(byte 0xc3 at 0\)"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz, after line 0: the rest cannot be read"),
        (
            "a.jsonl.gz",
            truncated(gzip.compress(jsonl(TEXTS * 99), mtime=0)),  # the same whenever tests are collected
            r"a\.jsonl\.gz, after line \d+: the rest cannot be read",
        ),
        ("a.txt.zst", b"not zstandard", r"a\.txt\.zst, after line 0: the rest cannot be read"),
        (
            "a.jsonl.zst",
            truncated(zstandard.compress(jsonl(TEXTS * 99))),
            r"a\.jsonl\.zst, after line \d+: the rest cannot",
        ),
        ("a.parquet", b"not parquet", r"a\.parquet: a damaged or incomplete Parquet file"),
        (
            "a.parquet.gz",
            b"not gzip",
            r"a\.parquet\.gz: a damaged or incomplete Parquet file \(Not a gzipped file",
        ),
        (
            "a.parquet",
            parquet_of_bytes([b"fine", b"caf\xe9"]),
            r"a\.parquet, row 2: not valid UTF-8 \(byte 0xe9 at 3\)",
        ),
        (
            "a.jsonl",
            b'{"text": ' + b"[" * 1200 + b"]" * 1200 + b"}",
            r"line 1: JSON nested too deeply \(1,201",
        ),
        (
            "a.txt.zst",
            zstandard_frame(b"x", 32),
            r"its window is larger than 2 GiB; compress it again with zstd",
        ),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid",
            r"a\.txt: a Git LFS pointer; .* git lfs pull",
        ),
        ("a.jsonl.gz", b"/annex/objects/MD5E-s3--x\n", r"a\.jsonl\.gz: a git-annex pointer"),
        ("a.parquet", parquet_bytes(["x", None]), r"a\.parquet, row 2: no text in the field 'text'"),
        ("a.parquet", parquet_bytes([1, 2]), r"a\.parquet, row 1: the field 'text' holds int"),
        ("a.csv", b"a,b", r"a\.csv: a file of unknown type; accepted: \.txt"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        documents(tmp_path / "a*")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("window_log", [28, 31])
def test_long_windows_are_read(tmp_path: Path, window_log: int):
    (tmp_path / "a.txt.zst").write_bytes(zstandard_frame(b"far back", window_log))
    assert documents(tmp_path / "a.txt.zst") == ["far back"]


def test_brackets_within_a_text_are_no_nesting(tmp_path: Path):
    texts = ["[{" * 2000, '\\" [' * 2000]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts) + b'{"text": "", "n": [' + b"[], " * 2000 + b"1]}\n")
    assert documents(tmp_path / "a.jsonl") == texts


def refusing(path: Path, error: OSError) -> Callable[..., Any]:
    """`Path.open` that fails for one file."""
    real = Path.open

    def open_(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise error
        return real(self, *args, **kwargs)

    return open_


def test_a_file_without_permission_is_named_and_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "open", refusing(tmp_path / "b.txt", error))
    with pytest.raises(UserError, match=r"b\.txt cannot be read: Permission denied\.$"):
        list(open_documents((str(tmp_path / "*.txt"),), "text", skip_invalid=9))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz"])
def test_a_broken_disk_is_reported_and_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / name).write_bytes(b"text")
    monkeypatch.setattr(Path, "open", lambda self, mode: Broken())
    with pytest.raises(UserError, match=rf"{name} cannot be read: Input/output error\.$"):
        list(open_documents((str(tmp_path / name),), "text", skip_invalid=9))


def test_missing_columns_files_and_folders_are_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["x"]))
    with pytest.raises(
        UserError, match=r"a\.parquet: no text in the field 'body'.*\(fields there: text, id\)"
    ):
        documents(tmp_path / "a.parquet", "body")
    with pytest.raises(UserError, match=r"'.*none\.txt' matches no file; accepted: python-docs, or globs"):
        documents(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"matches no file \(it is a folder; write .*/\*\*/\*\.txt for"):
        documents(tmp_path)


def test_parquet_without_pyarrow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["x"]))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'gemma2_jax\[parquet\]'\.$"):
        documents(tmp_path / "a.parquet")


def test_files_are_read_as_a_stream(tmp_path: Path):
    # The bad line is never reached.
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"] * 10_000) + b"bad\n")
    assert next(iter(open_documents((str(tmp_path / "a.jsonl"),), "text")))[0] == "x"


@pytest.fixture(scope="module")
def python_docs() -> list[str]:
    return [text for text, _ in PythonDocs()]


@pytest.mark.thorough
def test_python_docs_are_several_megabytes_of_different_text(python_docs: list[str]):
    assert sum(map(len, python_docs)) > 1_500_000
    assert len(set(python_docs)) == len(python_docs) > 2000
    assert all(text.strip() for text in python_docs)
    "".join(python_docs).encode()  # no lone surrogates


def test_python_docs_hold_modules_classes_functions_and_topics(python_docs: list[str]):
    assert any(text.startswith("textwrap\n\nText wrapping and filling.") for text in python_docs)
    assert any(
        text.startswith("class textwrap.TextWrapper\n\n") and "fill(self, text)\n\n" in text
        for text in python_docs
    )
    assert any(text.startswith("textwrap.dedent(text)\n\nRemove any common") for text in python_docs)
    assert any(text.startswith("Lambdas\n*******") for text in python_docs)
    assert not any(text.startswith(("test.", "class test.", "site-packages")) for text in python_docs)


@pytest.mark.thorough
def test_python_docs_are_the_same_in_another_process_and_import_nothing(python_docs: list[str]):
    code = (
        "import hashlib, sys; from gemma2_jax.data.python_docs import PythonDocs; before = set(sys.modules)\n"
        "texts = [text for text, _ in PythonDocs()]\n"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest(), *(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}  # another order of sets
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    digest, *imported = ran.stdout.split()
    assert digest == hashlib.sha256(repr(python_docs).encode()).hexdigest()
    assert not {"antigravity", "this", "pydoc_data", "tkinter", "textwrap"} & set(imported)
