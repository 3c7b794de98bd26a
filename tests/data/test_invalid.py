"""Records that cannot be read are refused, or left out and counted: data.skip_invalid."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.invalid import Skipped
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.shards import ShardWriter, read_data_manifest
from gemma2_jax.data.sources import open_documents
from tests.data.files import jsonl, parquet_of_bytes, write_jsonl

DEEP = b'{"text": ' + b"[" * 1200 + b"]" * 1200 + b"}\n"
BAD_LINES = {
    "no text in the field 'text'": b'{"text": null}\n',
    "not valid UTF-8": '{"text": "café"}\n'.encode("latin-1"),
    "JSON nested too deeply": DEEP,
    "not valid JSON": b"{\n",
    "not a JSON object": b"[]\n",
    "the field 'text' holds int": b'{"text": 1}\n',
    "the text contains a lone surrogate": b'{"text": "\\ud800"}\n',
}


@pytest.fixture(params=["with a tokenizer", "without one"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_config: TokenizerConfig, tmp_path: Path):
    """Training reads the source within SentencePiece, which turns every error into another type."""
    if request.param == "with a tokenizer":
        request.getfixturevalue("data")  # which trains it
        return tokenizer_config
    return TokenizerConfig(str(tmp_path / "own.model"), vocab_size=380)


@pytest.fixture
def own(data: DataConfig, tmp_path: Path) -> DataConfig:
    return replace(data, source=str(tmp_path / "texts" / "*"), folder=str(tmp_path / "prepared"))


def write(own: DataConfig, name: str, content: bytes) -> None:
    path = Path(str(own.source)).with_name(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def read(path: Path | str, skip_invalid: float) -> tuple[list[str], Skipped]:
    source = open_documents((str(path),), "text", skip_invalid)
    return [text for text, _ in source], source.skipped


@pytest.mark.parametrize("problem", BAD_LINES)
def test_one_bad_line_is_refused_or_left_out(
    own: DataConfig, tokenizer: TokenizerConfig, texts: list[str], problem: str
):
    write(own, "a.jsonl", jsonl(texts[:90]) + BAD_LINES[problem] + jsonl(texts[90:]))
    with pytest.raises(UserError) as caught:
        prepare(own, tokenizer)
    message = str(caught.value)
    assert f"a.jsonl, line 91: {problem}" in message
    assert message.endswith("; data.skip_invalid=N leaves out up to N such records.")
    assert "\n" not in message
    manifest = prepare(replace(own, skip_invalid=1), tokenizer)
    assert (manifest.train + manifest.validation).documents == len(texts)
    place = f"{own.source}"[:-1] + "a.jsonl, line 91"
    assert manifest.skipped == Skipped(1, len(texts) + 1, {problem: 1}, (place,))


def test_skipped_records_are_reported_once_and_recorded(
    own: DataConfig, tokenizer: TokenizerConfig, texts: list[str], capsys: pytest.CaptureFixture[str]
):
    write(own, "a.jsonl", jsonl(texts) + b"".join(BAD_LINES.values()))
    write(own, "b.py", b"print()")
    prepare(replace(own, skip_invalid=20), tokenizer)
    output = capsys.readouterr().err
    assert (
        output.count("8 invalid records of 128 (a file of unknown type: 1, no text in the field 'text': 1,")
        == 1
    )
    assert len([line for line in output.splitlines() if not line.endswith("…")]) == 2
    assert "first: " in output
    assert "a.jsonl, line 124; …)" in output  # five places
    assert read_data_manifest(own.folder).skipped.records == 8


def test_more_than_allowed_are_refused(own: DataConfig, tokenizer: TokenizerConfig, texts: list[str]):
    write(own, "a.jsonl", jsonl(texts) + b"{\n" * 3)
    with pytest.raises(UserError, match=r"skip_invalid is 2, but .* more .*\(next: .*line 123: not valid"):
        prepare(replace(own, skip_invalid=2), tokenizer)
    with pytest.raises(
        UserError, match=r"is 0\.02, but data\.source has 3 invalid records of 123 .*at least 3\.$"
    ):
        prepare(replace(own, skip_invalid=0.02), tokenizer)
    assert prepare(replace(own, skip_invalid=0.03), tokenizer).skipped.records == 3


def test_a_folder_with_more_left_out_than_allowed_is_refused(
    own: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str]
):
    write(own, "a.jsonl", jsonl(texts) + b"{\n" * 3)
    manifest = prepare(replace(own, skip_invalid=3), tokenizer_config)
    assert prepare(replace(own, skip_invalid=0.5), tokenizer_config) == manifest
    with pytest.raises(
        UserError, match=r"skip_invalid is 0, but data\.folder .* was prepared without 3 invalid"
    ):
        prepare(own, tokenizer_config)


def test_a_preparation_that_was_stopped_counts_all(
    own: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    write(own, "a.jsonl", b"{\n" + jsonl(texts) + b"{\n")
    asked, real, written = replace(own, skip_invalid=2), ShardWriter.write, []

    def stop(self: ShardWriter, *args) -> None:
        written.append(args)
        if len(written) == len(texts):
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(asked, tokenizer_config)
    assert prepare(asked, tokenizer_config).skipped.records == 2


def test_a_bad_byte_costs_a_text_file_the_document_around_it(tmp_path: Path):
    paragraphs = [f"{number} ".encode() * 2500 + b"\n\n" for number in range(9)]
    paragraphs[4] = b"caf\xe9 " * 1500 + b"\n\n"
    (tmp_path / "a.txt").write_bytes(b"".join(paragraphs))
    read_texts, skipped = read(tmp_path / "a.txt", 1)
    assert read_texts == [paragraph.decode() for paragraph in paragraphs if b"caf" not in paragraph]
    assert skipped == Skipped(1, 9, {"not valid UTF-8": 1}, (f"{tmp_path}/a.txt, line 9",))


def test_rows_of_parquet_are_left_out(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(parquet_of_bytes([b"one", b"\xff", b"three"]))
    assert read(tmp_path / "a.parquet", 1)[0] == ["one", "three"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("b.py", lambda path: path.write_text("print()")),
        ("b.txt", lambda path: path.symlink_to("nowhere")),
        ("b.jsonl", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")),
        ("b.parquet", lambda path: path.write_bytes(b"no Parquet")),
        ("b.txt.gz", lambda path: path.write_bytes(b"no gzip")),
        ("b.txt", lambda path: path.mkdir()),
    ],
)
def test_files_that_hold_no_record_are_one_each(tmp_path: Path, name: str, make: Callable[[Path], object]):
    make(tmp_path / name)
    (tmp_path / "a.txt").write_text("fine")
    with pytest.raises(UserError, match=rf"/{name}.*; data\.skip_invalid=N leaves out"):
        read(tmp_path / "*", 0)
    texts, skipped = read(tmp_path / "*", 1)
    assert texts == ["fine"]
    assert (skipped.records, skipped.of) == (1, 2)
    assert skipped.places[0].startswith(f"{tmp_path}/{name}")


def test_a_source_of_nothing_else_is_refused(tmp_path: Path):
    (tmp_path / "a.py").write_text("print()")
    with pytest.raises(UserError, match=r"a\.py: a file of unknown type"):
        read(tmp_path / "*", 99)


def test_manifests_hold_what_was_left_out(
    own: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str]
):
    write_jsonl(Path(str(own.source)).parent.parent / "c.jsonl", texts)
    write(own, "a.jsonl", jsonl(texts) + b"{\n")
    manifest = prepare(replace(own, skip_invalid=1), tokenizer_config)
    stored = json.loads((Path(own.folder) / "manifest.json").read_text())["skipped"]
    assert stored == {**vars(manifest.skipped), "places": list(manifest.skipped.places)}


def test_mended_records_are_changed_content_before_anything_else(
    own: DataConfig, tokenizer: TokenizerConfig, texts: list[str]
):
    write(own, "a.jsonl", jsonl(texts) + b"{\n")
    prepare(replace(own, skip_invalid=1), tokenizer)
    write(own, "a.jsonl", jsonl(texts))
    with pytest.raises(UserError, match=r"^data\.source has changed since .*a\.jsonl"):
        prepare(own, tokenizer)
