"""A prepared folder belongs to the content of its source, not to names, sizes and times of files."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress

from gemma2_jax.config import UserError
from gemma2_jax.data import python_docs, source_content
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.prepare import prepare, verify_source
from gemma2_jax.data.python_docs import PythonDocs
from gemma2_jax.data.shards import MANIFEST, ShardWriter, find_data_manifest, read_data_manifest
from gemma2_jax.data.source_content import HASHES_FILE, content_of
from gemma2_jax.data.sources import Files, open_documents
from tests.data.files import write_jsonl


@pytest.fixture
def source(texts: list[str], tmp_path: Path) -> Path:
    """A folder of two files, with a number in each text that could be a telephone's."""
    (tmp_path / "texts").mkdir()
    for name, part in (("a", texts[:60]), ("b", texts[60:])):
        write_jsonl(tmp_path / "texts" / f"{name}.jsonl", [f"{text} 555-0199" for text in part])
    return tmp_path / "texts"


@pytest.fixture
def own(data: DataConfig, source: Path, tmp_path: Path) -> DataConfig:
    """Data configuration of a folder prepared from `source`."""
    return replace(data, source=str(source / "*.jsonl"), folder=str(tmp_path / "prepared"))


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is read to compare it."""
    names, real = [], Files.digest

    def digest(self: Files, path: Path, advance: Callable[[int], None]) -> str:
        names.append(path.name)
        return real(self, path, advance)

    monkeypatch.setattr(Files, "digest", digest)
    return names


def mask(path: Path) -> None:
    """Replaces the digits with as many letters; size and modification time stay the same."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"555-0199", b"XXX-XXXX"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def of(*patterns: Path, text_field: str = "text") -> str:
    source = open_documents(tuple(map(str, patterns)), text_field)
    return content_of(source, (), Progress(disable=True)).identity


def test_masked_text_is_refused_and_reported(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path
):
    prepare(own, tokenizer_config)
    assert verify_source(own.folder)
    mask(source / "b.jsonl")
    with pytest.raises(
        UserError, match=r"data\.source has changed since .* was prepared \(.*/b\.jsonl\); set"
    ):
        prepare(own, tokenizer_config)
    with pytest.raises(UserError, match=r"has changed since .* \(.*/b\.jsonl\); delete that folder"):
        verify_source(own.folder)


def test_masked_text_is_another_source(source: Path):
    before = of(source / "*")
    mask(source / "a.jsonl")
    assert of(source / "*") != before


def test_files_that_were_left_alone_are_not_read_again(
    own: DataConfig,
    tokenizer_config: TokenizerConfig,
    source: Path,
    digested: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    prepare(own, tokenizer_config)
    # They were written just now, and could have been written again within one tick of the clock.
    digested.clear()
    prepare(own, tokenizer_config)
    assert digested == ["a.jsonl", "b.jsonl"]
    monkeypatch.setattr(source_content, "_SETTLED", -1)
    prepare(own, tokenizer_config)
    digested.clear()
    prepare(own, tokenizer_config)
    assert digested == []
    mask(source / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl"):
        prepare(own, tokenizer_config)
    assert digested == ["b.jsonl"]


def touched(source: Path) -> Path:
    for path in source.iterdir():
        os.utime(path, (1, 1))
    return source


def replaced(source: Path) -> Path:
    for path in list(source.iterdir()):
        shutil.copyfile(path, source / "copy")
        (source / "copy").rename(path)
    return source


def moved(source: Path) -> Path:
    return source.rename(source.with_name("elsewhere"))


def renamed(source: Path) -> Path:
    for path in list(source.iterdir()):
        path.rename(path.with_name(f"part_{path.name}"))
    return source


@pytest.mark.parametrize("change", [touched, replaced, moved, renamed])
def test_equal_content_keeps_its_folder(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path, change: Callable[[Path], Path]
):
    manifest = prepare(own, tokenizer_config)
    asked = replace(own, source=f"{change(source)}/*.jsonl")
    shards = [Path(own.folder) / shard.file for shard in manifest.train_shards]
    before = [path.stat().st_mtime_ns for path in shards]
    assert prepare(asked, tokenizer_config) == manifest
    assert [path.stat().st_mtime_ns for path in shards] == before


def test_without_its_source_a_folder_is_that_of_the_same_name_only(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path
):
    manifest = prepare(own, tokenizer_config)
    shutil.rmtree(source)
    assert prepare(own, tokenizer_config) == manifest
    assert not verify_source(own.folder)
    with pytest.raises(UserError, match=r"matches no file"):
        prepare(replace(own, source=str(source / "other.jsonl")), tokenizer_config)


def test_the_order_of_files_counts(source: Path):
    before = of(source / "*")
    (source / "a.jsonl").rename(source / "c.jsonl")
    assert of(source / "*") != before


def reordered(source: Path) -> None:
    (source / "a.jsonl").rename(source / "c.jsonl")


def as_text(source: Path) -> None:
    for name in "ab":
        (source / f"{name}.jsonl").rename(source / f"{name}.txt")


def without_one(source: Path) -> None:
    (source / "b.jsonl").unlink()


def with_a_copy(source: Path) -> None:
    shutil.copyfile(source / "b.jsonl", source / "c.jsonl")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            reordered,
            r"no file's content has changed, only the order of the files, which .*: \S+/b\.jsonl is now "
            r"in the place of \S+/a\.jsonl; rename the files to restore it",
        ),
        (
            as_text,
            r"no file's content has changed, only the names, whose endings .*: \S+/a\.txt was "
            r"\S+/a\.jsonl",
        ),
        (without_one, r"\S+/b\.jsonl is gone"),
        (with_a_copy, "2 files, now 3: other copies of the same content"),
    ],
)
def test_the_refusal_names_what_has_changed(
    own: DataConfig,
    tokenizer_config: TokenizerConfig,
    source: Path,
    change: Callable[[Path], None],
    found: str,
):
    own = replace(own, source=str(source / "*"))
    prepare(own, tokenizer_config)
    change(source)
    with pytest.raises(UserError, match=rf"data\.source has changed since .* was prepared \({found}\); set"):
        prepare(own, tokenizer_config)


def test_the_field_that_is_read_counts_where_there_is_one(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "two"}\n')
    (tmp_path / "a.txt").write_text("one")
    assert of(tmp_path / "a.jsonl") != of(tmp_path / "a.jsonl", text_field="body")
    assert of(tmp_path / "a.txt") == of(tmp_path / "a.txt", text_field="body")


def test_a_source_that_changes_meanwhile_is_refused(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path, monkeypatch: pytest.MonkeyPatch
):
    write = ShardWriter.write

    def masking(self: ShardWriter, *args) -> None:
        mask(source / "b.jsonl")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", masking)
        with pytest.raises(
            UserError, match=r"data\.source changed during preparation \(.*b\.jsonl\); delete"
        ):
            prepare(own, tokenizer_config)
    with pytest.raises(UserError, match="prepared only in part"):
        read_data_manifest(own.folder)


def stop_at_once(data: DataConfig, tokenizer: TokenizerConfig, patch: pytest.MonkeyPatch) -> None:
    def stop(self: ShardWriter, *args) -> None:
        raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tokenizer)


def test_a_tokenizer_of_the_text_before_is_not_used(
    own: DataConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After a stop between training it and writing the first shard, only the tokenizer exists."""
    tokenizer = TokenizerConfig(str(tmp_path / "own.model"), vocab_size=380)
    stop_at_once(own, tokenizer, monkeypatch)
    assert Path(tokenizer.path).exists()
    mask(source / "b.jsonl")
    with pytest.raises(
        UserError, match=r"delete this one and the file of tokenizer\.path, trained on that text"
    ):
        prepare(own, tokenizer)


def test_a_source_that_was_mended_behind_what_is_done_goes_on(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path, tmp_path: Path
):
    with (source / "b.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 61: no text in the field"):
        prepare(own, tokenizer_config)
    begun = find_data_manifest(own.folder)
    assert begun is not None
    assert begun.parts
    lines = (source / "b.jsonl").read_text().splitlines(keepends=True)
    (source / "b.jsonl").write_text("".join(lines[:-1]))
    manifest = prepare(own, tokenizer_config)
    assert manifest.parts[: len(begun.parts)] == begun.parts
    assert manifest == prepare(replace(own, folder=str(tmp_path / "fresh")), tokenizer_config)


def test_a_folder_of_an_older_version_is_refused_with_a_remedy(
    own: DataConfig, tokenizer_config: TokenizerConfig
):
    prepare(own, tokenizer_config)
    path = Path(own.folder) / MANIFEST
    manifest = json.loads(path.read_text())
    for added in ("skipped", "tokenizer_trained"):
        del manifest[added]
    path.write_text(json.dumps(manifest | {"format": 1, "identity": "2 files of 9 bytes (0123456789ab)"}))
    with pytest.raises(
        UserError, match=r"has format 1, but .* format 2, 3 or 4; delete .* to prepare it again\.$"
    ):
        prepare(own, tokenizer_config)


@pytest.mark.parametrize("content", ["", "[]", '[{"path": 1}]'])
def test_what_was_seen_may_be_lost(own: DataConfig, tokenizer_config: TokenizerConfig, content: str):
    manifest = prepare(own, tokenizer_config)
    (Path(own.folder) / HASHES_FILE).write_text(content)
    assert prepare(own, tokenizer_config) == manifest


def test_names_need_not_be_utf8(
    own: DataConfig, tokenizer_config: TokenizerConfig, source: Path, capsys: pytest.CaptureFixture[str]
):
    for name in (b"caf\xe9.jsonl", b"caf\xe9.py"):
        shutil.copyfile(source / "a.jsonl", os.fsencode(source / "x").removesuffix(b"x") + name)
    asked = replace(own, source=str(source / "*"), skip_invalid=1)
    manifest = prepare(asked, tokenizer_config)
    assert r"first: " in (output := capsys.readouterr().err)
    assert r"/caf\xe9.py" in output
    assert prepare(asked, tokenizer_config) == manifest


def test_python_docs_are_distinguished_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))

    def of_python(docstring: str) -> str:
        (tmp_path / "module.py").write_text(f'"""{docstring}"""\nprefix = "{tmp_path}"\n')
        return content_of(PythonDocs(), (), Progress(disable=True)).identity

    assert of_python("one") != of_python("two")  # of the same Python version, and size
    (tmp_path / "link.py").symlink_to("nowhere.py")
    assert of_python("one") == of_python("one")
