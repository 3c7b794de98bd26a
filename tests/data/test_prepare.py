import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from gemma2_jax.config import UserError
from gemma2_jax.data import tokenise
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.shards import (
    MANIFEST,
    DataManifest,
    ShardWriter,
    find_data_manifest,
    read_data_manifest,
    token_dtype,
    verify,
)
from gemma2_jax.data.source_content import HASHES_FILE
from gemma2_jax.data.tokenizer import Tokenizer


def contents(folder: str | Path) -> dict[str, bytes]:
    """The prepared data, without the time of reading the source and the preparation that trained the tokenizer."""
    files = (path for path in Path(folder).iterdir() if path.is_file() and path.name != HASHES_FILE)
    trained = b'"tokenizer_trained": true'
    return {
        path.name: path.read_bytes().replace(trained, trained.replace(b"true", b"false")) for path in files
    }


def split_texts(data: DataConfig, tokenizer: Tokenizer, split: str) -> list[str]:
    manifest = read_data_manifest(data.folder)
    shards = manifest.train_shards if split == "train" else manifest.validation_shards
    source = ArrayRecordDataSource([str(Path(data.folder) / shard.file) for shard in shards])
    return [tokenizer.decode(np.frombuffer(record, manifest.dtype)) for record in source]


def test_every_document_is_stored_once_in_order(data: DataConfig, tokenizer: Tokenizer, texts: list[str]):
    train, validation = (split_texts(data, tokenizer, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]


def test_brackets_in_the_folders_name_are_no_markup(
    data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "a [bold]@2"
    prepare(replace(data, folder=str(folder)), tokenizer_config)
    assert f"{folder}: " in capsys.readouterr().err
    assert contents(folder) == contents(data.folder)


def test_records_are_bos_text_eos_in_two_bytes(data: DataConfig, tokenizer: Tokenizer):
    shard = read_data_manifest(data.folder).train_shards[0]
    record = ArrayRecordDataSource(str(Path(data.folder) / shard.file))[0]
    ids = np.frombuffer(record, "<u2").tolist()
    assert ids == tokenizer.encode(tokenizer.decode(ids), bos=True, eos=True)


def test_tokens_take_the_narrowest_type():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_manifest_counts_and_checksums(data: DataConfig, tokenizer: Tokenizer, texts: list[str]):
    manifest = read_data_manifest(data.folder)
    assert len(manifest.train_shards) > 2
    assert manifest.tokenizer == tokenizer.fingerprint
    total = manifest.train + manifest.validation
    assert total.documents == len(texts)
    assert total.characters == sum(map(len, texts))
    assert total.bytes == sum(len(text.encode()) for text in texts)
    assert total.tokens == sum(len(tokenizer.encode(text)) + 2 for text in texts)
    files = contents(data.folder)
    for shard in (*manifest.train_shards, *manifest.validation_shards):
        assert shard.sha256 == hashlib.sha256(files[shard.file]).hexdigest()
        assert shard.size == len(files[shard.file])


def test_split_depends_on_the_content_alone(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    tokenizer: Tokenizer,
    texts: list[str],
    tmp_path: Path,
):
    shuffled = random.Random(1).sample(texts, len(texts))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in shuffled))
    other = replace(data, source=str(tmp_path / "*"), folder=str(tmp_path / "data"), shard_characters=5_000)
    prepare(other, tokenizer_config)
    held_out = split_texts(other, tokenizer, "validation")
    assert sorted(held_out) == sorted(split_texts(data, tokenizer, "validation"))
    assert 0.1 < len(held_out) / len(texts) < 0.3  # 0.2 was asked for


def test_processes_write_what_one_would(data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path):
    parallel = replace(data, folder=str(tmp_path), workers=2)
    prepare(parallel, tokenizer_config)
    assert contents(tmp_path) == contents(data.folder)


def test_preparing_imports_no_jax():
    # Workers import what this module imports.
    code = "import sys, gemma2_jax.data.prepare; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_script_without_a_main_guard_is_reported(
    data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
):
    # Workers import the script, which calls prepare again; this must end with an error of one sentence.
    config = replace(data, folder=str(tmp_path / "data"), workers=2)
    (tmp_path / "script.py").write_text(
        "from gemma2_jax.data.config import DataConfig, TokenizerConfig\n"
        "from gemma2_jax.data.prepare import prepare\n"
        f"prepare({config!r}, {tokenizer_config!r})\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "call prepare under `if __name__" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_source_is_read_only_a_little_ahead(
    tokenizer_config: TokenizerConfig, tokenizer: Tokenizer, workers: int
):
    read = 0

    def tasks() -> Iterator[tokenise.Task]:
        nonlocal read
        while True:  # never ends, so collecting it first would not either
            read += 1
            yield [f"document {read}"], read

    results = tokenise.tokenise_all(tasks(), tokenizer_config.path, 0.0, workers)
    for number in range(1, 10):
        task, done = next(results)
        assert task == ([f"document {number}"], number)
        assert np.frombuffer(done[0].record, "<u2").tolist() == tokenizer.encode(
            task[0][0], bos=True, eos=True
        )
    assert read < 10 + 2 * workers
    results.close()  # type: ignore[attr-defined]


def test_second_call_changes_nothing(data: DataConfig, tokenizer_config: TokenizerConfig):
    files = [Path(data.folder) / name for name in contents(data.folder)]
    before = [path.stat().st_mtime_ns for path in files]
    assert prepare(data, tokenizer_config) == read_data_manifest(data.folder)
    assert [path.stat().st_mtime_ns for path in files] == before


def stopped_after(
    parts: int, data: DataConfig, tokenizer: TokenizerConfig, patch: pytest.MonkeyPatch
) -> DataManifest:
    """Prepares until `parts` training shards are written and another one is half written."""
    write, shards = ShardWriter.write, []

    def stop(self: ShardWriter, *args) -> None:
        if self not in shards:
            shards.append(self)
        write(self, *args)
        if sum("train" in writer._records._path.name for writer in shards) > parts:
            raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tokenizer)
    manifest = find_data_manifest(data.folder)
    assert manifest is not None
    assert not manifest.complete
    assert len(manifest.parts) == parts
    return manifest


def test_a_full_disk_is_reported(data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path):
    """A limit on the size of files stands for a full disk."""
    full, limit = replace(data, folder=str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"train-00000.arrayrecord could not be written: "):
            prepare(full, tokenizer_config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [name for name in contents(tmp_path) if name.endswith((".tmp", ".arrayrecord"))]
    prepare(full, tokenizer_config)
    assert contents(tmp_path) == contents(data.folder)


def test_interrupted_preparation_goes_on(
    data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped = replace(data, folder=str(tmp_path))
    manifest = stopped_after(2, stopped, tokenizer_config, monkeypatch)
    names = {shard.file for shard in (*manifest.train_shards, *manifest.validation_shards)}
    assert set(contents(tmp_path)) == {*names, MANIFEST, ".lock"}  # nothing half written is left
    with pytest.raises(UserError, match=r"prepared only in part"):
        read_data_manifest(tmp_path)

    # What a process that was killed leaves behind.
    (tmp_path / ".train-00002.arrayrecord.tmp").write_bytes(b"half a shard")
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    prepare(stopped, tokenizer_config)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names} == kept
    assert contents(tmp_path) == contents(data.folder)


def test_source_that_changed_between_is_refused(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stopped = replace(data, source=str(source), folder=str(tmp_path / "data"))
    stopped_after(1, stopped, tokenizer_config, monkeypatch)
    source.write_text(source.read_text().replace("teacher", "Teacher"))  # as many bytes as before
    with pytest.raises(UserError, match=r"data.source has changed since the preparation of .* was stopped"):
        prepare(stopped, tokenizer_config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        pytest.param(
            {"source": "python-docs"},
            r"data\.source \['.*corpus\.jsonl'\], but \['python-docs'\] contains different text;",
            marks=pytest.mark.thorough,
        ),
        (
            {"text_field": "body"},
            r"data\.text_field \(text, now body\); write data\.text_field=text to use it,",
        ),
        (
            {"validation_fraction": 0.1},
            r"data\.validation_fraction \(0\.2, now 0\.1\); write data\.validation_fraction=0\.2 to use it,",
        ),
    ],
)
def test_another_configuration_is_refused(
    data: DataConfig, tokenizer_config: TokenizerConfig, changes: dict[str, str | float], key: str
):
    with pytest.raises(
        UserError,
        match=f"{key} set another folder, as in data.folder=.*-2, or delete this one",
    ):
        prepare(replace(data, **changes), tokenizer_config)  # type: ignore[arg-type]


def test_another_tokenizer_is_refused(data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path):
    other = TokenizerConfig(path=str(tmp_path / "other.model"), vocab_size=380)
    with pytest.raises(UserError, match=r"a different tokenizer \("):
        prepare(data, other)
    with pytest.raises(UserError, match=r"tokenizer.vocab_size is 380, but .* has 400 tokens"):
        prepare(data, replace(tokenizer_config, vocab_size=380))
    with pytest.raises(UserError, match=r"no tokenizer file .*absent\.model"):
        prepare(data, TokenizerConfig(path=str(tmp_path / "absent.model"), vocab_size=None))


def test_prepared_folder_outlives_its_source(
    data: DataConfig, tokenizer_config: TokenizerConfig, texts: list[str], tmp_path: Path
):
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other = replace(data, source=str(source), folder=str(tmp_path / "data"))
    manifest = prepare(other, tokenizer_config)
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(
        UserError,
        match=r"data\.source has changed since .* \(.*source\.jsonl\); set another folder, as in",
    ):
        prepare(other, tokenizer_config)
    source.unlink()
    assert prepare(other, tokenizer_config) == manifest


def test_damage_is_found(data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path):
    other = replace(data, folder=str(tmp_path))
    prepare(other, tokenizer_config)
    verify(tmp_path)
    shard = tmp_path / read_data_manifest(tmp_path).train_shards[1].file
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(UserError, match=r"train-00001\.arrayrecord has changed since it was written"):
        verify(tmp_path)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train-00001\.arrayrecord is missing or incomplete"):
        read_data_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(
        json.dumps({**json.loads((tmp_path / MANIFEST).read_text()), "format": 0})
    )
    with pytest.raises(UserError, match=r"has format 0, but this version reads format 2"):
        read_data_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(UserError, match=rf"{MANIFEST} is empty; delete {tmp_path} to prepare it again\.$"):
        read_data_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"is not a manifest of prepared data"):
        read_data_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"), [(" \n\n", "holds no text"), ("x", "holds a single character")]
)
def test_a_refused_preparation_leaves_nothing(data: DataConfig, text: str, sentence: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(text)
    new = tmp_path / "new"
    config = replace(data, source=str(tmp_path / "*.txt"), folder=str(new / "data" / "notes"))
    with pytest.raises(UserError, match=sentence):
        prepare(config, TokenizerConfig(str(new / "tokenizers" / "a.model"), 400))
    assert not new.exists()


def test_a_line_that_cannot_be_read_leaves_nothing_but_what_was_there(data: DataConfig, tmp_path: Path):
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {number} of the text"}) for number in range(300)]
    source.write_text("\n".join([*lines, '{"text": 5}']))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "own.txt").write_text("of the user")
    config = replace(data, source=str(source), folder=str(folder), shard_characters=10**9)
    with pytest.raises(UserError):
        prepare(config, TokenizerConfig(str(folder / "tokenizer.model"), 320))
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"own.txt"}


def test_the_vocabulary_is_an_upper_bound(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"note {number} of few words"}) + "\n" for number in range(40))
    )
    config = replace(data, source=str(source), folder=str(tmp_path / "data"))
    asked = TokenizerConfig(str(tmp_path / "data" / "tokenizer.model"), 4096)
    manifest = prepare(config, asked)
    assert 300 < manifest.vocab_size < 400
    assert (
        f"tokenizer.vocab_size is 4096, but this text supports at most {manifest.vocab_size}; lowered to "
        f"{manifest.vocab_size}." in capsys.readouterr().err
    )
    for size in (4096, 8192, manifest.vocab_size, None):  # once more, from a saved configuration too
        assert prepare(config, replace(asked, vocab_size=size)) == manifest
    with pytest.raises(UserError, match=rf"vocab_size is 300, but .* has {manifest.vocab_size} tokens"):
        prepare(config, replace(asked, vocab_size=300))
    # The file is the same as with a vocab_size of the number that is possible.
    other = replace(asked, path=str(tmp_path / "other.model"), vocab_size=manifest.vocab_size)
    assert prepare(replace(config, folder=str(tmp_path / "other")), other).tokenizer == manifest.tokenizer


def test_all_differences_are_reported_at_once_with_a_free_folder(
    data: DataConfig, tokenizer_config: TokenizerConfig
):
    other = replace(data, text_field="body", validation_fraction=0.1)
    with pytest.raises(UserError) as caught:
        prepare(other, tokenizer_config)
    for part in ("data.text_field (text, now body)", "data.validation_fraction (0.2, now 0.1)"):
        assert part in str(caught.value)
    assert f"set another folder, as in data.folder={data.folder}-2, or" in str(caught.value)


def test_tokenizer_is_trained_on_the_training_split(data: DataConfig, texts: list[str], tmp_path: Path):
    # The held-out documents are changed beyond recognition; the tokenizer must not notice.
    fingerprints = []
    for letter in "xy":
        folder = tmp_path / letter
        folder.mkdir()
        held_out = [text for text in texts if tokenise.is_validation(text, 0.2)]
        kept = [text for text in texts if text not in held_out]
        # Documents that hash to the validation split, full of one letter.
        extra = [
            f"{letter * 50} {i}" for i in range(200) if tokenise.is_validation(f"{letter * 50} {i}", 0.2)
        ]
        assert len(extra) > 10
        (folder / "source.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in kept + extra)
        )
        config = replace(data, source=str(folder / "source.jsonl"), folder=str(folder / "data"))
        manifest = prepare(config, TokenizerConfig(path=str(folder / "tokenizer.model"), vocab_size=380))
        fingerprints.append(manifest.tokenizer)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seq_len": 1}, r"data\.seq_len is 1; accepted: at least 2"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction is 1\.0"),
        ({"seed": -1}, r"data\.seed is -1"),
        ({"workers": 0}, r"data\.workers is 0"),
        (
            {"skip_invalid": -1},
            r"data\.skip_invalid is -1; it must be a whole number of records, or a fraction",
        ),
        ({"skip_invalid": 1.5}, r"data\.skip_invalid is 1\.5"),
        ({"source": ()}, r"data\.source is \(\)"),
        ({"folder": ""}, r"data\.folder is empty"),
    ],
)
def test_values_that_make_no_sense_are_refused(data: DataConfig, changes: dict[str, object], sentence: str):
    with pytest.raises(UserError, match=sentence):
        replace(data, **changes)  # type: ignore[arg-type]


def test_small_vocabularies_are_refused():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is 100; it must be at least 282"):
        TokenizerConfig(path="a.model", vocab_size=100)
