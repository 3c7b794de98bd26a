"""The teacher cache: writing, stopping, resuming, reading, and rejection for other runs."""

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import grain
import jax
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE, load_model, save_params
from gemma2_jax.config import UserError, save_config, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.tokenizer import train_tokenizer
from gemma2_jax.distill.cache import encoding, manifest
from gemma2_jax.distill.cache.encoding import EncodingConfig, check_encoding
from gemma2_jax.distill.cache.manifest import find_cache, read_cache, verify_cache
from gemma2_jax.distill.cache.reader import cached_batches, check_cache
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training import teacher_cache as writer
from gemma2_jax.training.teacher_cache import write_cache
from tests.model.models import vivid

STEPS = 6
TOP_K = EncodingConfig("top_k", 8)


def write_teacher(run: RunConfig, model: Gemma2, folder: Path) -> str:
    """A run folder with this model and the toy run's tokenizer."""
    save_params(folder, model.params(), to_dict(run))
    save_config(replace(run, output=str(folder), model=model.config), folder / CONFIG_FILE)
    shutil.copy(run.tokenizer.path, folder / TOKENIZER_FILE)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher wider than the student, with rows of padding in its vocabulary, and confident about some tokens."""
    config = replace(toy_run.model, d_model=48, vocab_size=416, vocab_padding=16)
    return write_teacher(toy_run, vivid(config), tmp_path_factory.mktemp("runs") / "teacher")


@pytest.fixture(scope="module")
def task(toy_run: RunConfig, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A student whose cache is to be written."""
    cache = str(tmp_path_factory.mktemp("caches") / "sampled")
    return replace(
        toy_run,
        objective=ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher, "float32", cache=cache, encoding=EncodingConfig()),
        mesh=MeshConfig(1, 4, 2),
        training=replace(toy_run.training, steps=STEPS, eval_every=STEPS),
        optimizer=replace(toy_run.optimizer, warmup_steps=0),
    )


def folder_of(task: RunConfig) -> str:
    """Its cache."""
    assert task.distill.cache is not None
    return task.distill.cache


def asking(task: RunConfig, steps: int | None = None, **distill: Any) -> RunConfig:
    """The student with another number of steps, and other keys of `distill`."""
    steps = task.training.steps if steps is None else steps
    training = replace(task.training, steps=steps, eval_every=steps)
    return replace(task, training=training, distill=replace(task.distill, **distill))


def with_targets(task: RunConfig) -> Iterator[tuple[Batch, SparseTargets]]:
    """The batches of its cache, each with the teacher's targets."""
    return ((batch, batch.extra["teacher_targets"]) for batch in cached_batches(task.data, folder_of(task)))


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_ROWS", 8)  # two steps


@pytest.fixture(scope="module")
def sampled(task: RunConfig) -> RunConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_ROWS", 8)
        write_cache(task)
    return task


@pytest.fixture(scope="module")
def top_k(task: RunConfig) -> RunConfig:
    task = asking(task, cache=f"{folder_of(task)}-top-k", encoding=TOP_K)
    write_cache(task)
    return task


def log_probabilities(task: RunConfig, batch: Any) -> np.ndarray:
    """Logits of the online teacher, [B, T, V]."""
    assert task.distill.teacher is not None
    model = load_model(task.distill.teacher)
    logits = model(batch.tokens, batch.positions, batch.segment_ids)[..., : model.config.num_tokens]
    return np.asarray(jax.nn.log_softmax(logits))


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def test_entries_equal_the_online_teachers_outputs_for_the_same_batch(top_k: RunConfig) -> None:
    step_bound = read_cache(folder_of(top_k)).grid.step
    plain = train_batches(top_k.data)
    for batch, sparse in with_targets(top_k):
        assert np.array_equal(batch.tokens, next(plain).tokens)
        expected = log_probabilities(top_k, batch)
        likeliest = np.sort(np.argsort(-expected, axis=-1)[..., :8], axis=-1)
        assert np.mean(sparse.ids == likeliest) > 0.999  # rounding may swap the eighth with the ninth
        known = np.take_along_axis(expected, sparse.ids, axis=-1)
        assert np.abs(sparse.log_weights - known).max() < step_bound + 1e-4
        tail = 1 - np.exp(known).sum(-1)
        assert np.abs(sparse.tail - tail).max() < 1.01 * step_bound * tail.max()
        np.testing.assert_allclose(np.exp(sparse.log_weights).sum(-1) + sparse.tail, 1, rtol=1e-5)


def test_the_cache_ends_after_its_steps(sampled: RunConfig) -> None:
    batches = list(with_targets(sampled))
    assert len(batches) == STEPS
    _, sparse = batches[0]
    assert sparse.ids.shape == (4, 32, read_cache(folder_of(sampled)).largest)
    assert (sparse.ids.dtype, sparse.log_weights.dtype, sparse.tail.dtype) == (
        np.int32,
        np.float32,
        np.float32,
    )
    np.testing.assert_allclose(np.exp(sparse.log_weights).sum(-1), 1, rtol=1e-5)
    assert not sparse.tail.any()


@pytest.mark.thorough
def test_draws_are_by_row_and_position_whatever_the_mesh_and_the_blocks(sampled: RunConfig) -> None:
    other = replace(
        asking(sampled, cache=f"{folder_of(sampled)}-mesh"),
        mesh=MeshConfig(2, 2, 2),
        objective=replace(sampled.objective, block_tokens=7),
    )
    write_cache(other)
    pairs = zip(with_targets(sampled), with_targets(other), strict=True)
    same = [
        np.mean(one.ids[..., :8] == two.ids[..., :8]) for (_, one), (_, two) in pairs
    ]  # but for logits that are rounded otherwise
    assert min(same) > 0.99
    _, sparse = next(with_targets(sampled))
    assert len({row.tobytes() for row in sparse.ids.reshape(-1, sparse.ids.shape[-1])}) > 100  # of 128


def test_a_stopped_cache_goes_on_and_is_the_same(
    sampled: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = asking(sampled, cache=str(tmp_path / "stopped"))
    write = writer.RecordWriter.write
    written = 0

    def stopped(self: Any, record: bytes) -> None:
        nonlocal written
        written += 1
        if written == 13:  # within the second stretch
            raise KeyboardInterrupt
        write(self, record)

    monkeypatch.setattr(writer.RecordWriter, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_cache(task)
    found = find_cache(folder_of(task))
    assert found is not None
    assert found.rows == 8
    monkeypatch.setattr(writer.RecordWriter, "write", write)
    assert write_cache(task).rows == STEPS * 4
    assert content(folder_of(task)) == content(folder_of(sampled))
    assert len(content(folder_of(task))) == 4
    assert verify_cache(folder_of(task)) == 3


def test_a_cache_grows_with_the_steps(sampled: RunConfig, tmp_path: Path) -> None:
    task = asking(sampled, steps=2, cache=str(tmp_path / "grown"))
    write_cache(task)
    assert write_cache(task).rows == 8
    write_cache(asking(task, steps=STEPS))
    assert content(folder_of(task)) == content(folder_of(sampled))


def test_reading_goes_on_where_it_was(top_k: RunConfig) -> None:
    batches = cached_batches(top_k.data, folder_of(top_k))
    next(batches)
    state = batches.get_state()
    expected = next(batches)
    again = cached_batches(top_k.data, folder_of(top_k))
    again.set_state(state)
    found = next(again)
    assert found.extra.keys() == expected.extra.keys() == {"teacher_targets"}
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "encoding", "steps"),
    [
        ({}, EncodingConfig("sampled", 12), STEPS),
        (
            {"seq_len": 8, "batch_size": 16},
            EncodingConfig("sampled", 12),
            40,
        ),  # rows that are small compared with their headers
        (
            {"batch_size": 16},
            EncodingConfig("full", None, weight_bits=16),
            30,
        ),  # rows that are large compared with the blocks of a file
    ],
)
def test_size_and_time_are_printed_before_anything_is_written(
    task: RunConfig,
    changes: dict[str, Any],
    encoding: EncodingConfig,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(writer, "CHUNK_ROWS", 200)
    data = replace(task.data, **changes)
    planned = replace(
        asking(task, steps=steps, cache=str(tmp_path / "planned"), encoding=encoding), data=data
    )
    write_cache(planned, estimate_only=True)
    message = capsys.readouterr().err
    assert not Path(folder_of(planned)).exists()
    assert f"{steps * data.batch_size} rows to go, about" in message
    made = write_cache(planned)
    assert kilobytes(message, "about ") == pytest.approx(made.size / 1000, rel=0.02)
    # The size per token excludes the headers and padding of files, which are larger than toy rows.
    records = grain.sources.ArrayRecordDataSource(
        [f"{folder_of(planned)}/{file.file}" for file in made.files]
    )
    size = sum(len(records[row]) for row in range(made.rows))
    estimate = float(message.split("(")[1].split(" bytes a token")[0])
    assert estimate == pytest.approx(size / (made.rows * data.seq_len), rel=0.02)
    assert kilobytes(message, "a token; ") == pytest.approx(
        (made.size - size) / 1000, abs=66 * len(made.files)
    )
    written = f"{made.rows:,} rows of {data.seq_len} tokens, "
    assert kilobytes(capsys.readouterr().err, written) == pytest.approx(made.size / 1000, rel=0.005)


def kilobytes(text: str, before: str) -> float:
    """The size that follows `before` in a line."""
    value, unit, *_ = text.split(before)[1].split()
    return float(value) * {"KB": 1, "MB": 1000}[unit]


def test_a_single_step_is_not_timed(
    task: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would include compilation, or cover no step at all."""
    write_cache(asking(task, steps=1, cache=str(tmp_path / "one")), estimate_only=True)
    message = capsys.readouterr().err
    assert message.startswith(f"{tmp_path}/one: 4 rows to go, about ")
    assert message.endswith("are headers and padding of files)\n")


@pytest.mark.thorough
def test_full_is_the_whole_distribution(task: RunConfig, tmp_path: Path) -> None:
    encoding = EncodingConfig("full", None, weight_bits=16)
    task = asking(task, steps=1, cache=str(tmp_path / "full"), encoding=encoding)
    write_cache(task)
    batch, sparse = next(with_targets(task))
    assert np.array_equal(sparse.ids[0, 0], np.arange(400))
    expected = log_probabilities(task, batch)
    assert np.abs(sparse.log_weights - expected).max() < read_cache(folder_of(task)).grid.step + 1e-4
    log_student = np.asarray(jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), expected.shape)))
    dense = np.sum(np.exp(expected) * (expected - log_student), -1)
    found = np.sum(np.exp(sparse.log_weights) * (sparse.log_weights - log_student), -1)
    np.testing.assert_allclose(found, dense, atol=2e-3)


def test_another_data_order_is_refused(sampled: RunConfig) -> None:
    others = [
        replace(sampled.data, seed=1),
        replace(sampled.data, seq_len=16),
        replace(sampled.data, batch_size=8),
        replace(sampled.data, shuffle_buffer=8),
    ]
    for key, data in zip(("seed", "seq_len", "batch_size", "shuffle_buffer"), others, strict=True):
        was, value = getattr(sampled.data, key), getattr(data, key)
        with pytest.raises(UserError, match=rf"data.{key} \({was}, now {value}\)"):
            cached_batches(data, folder_of(sampled))
        with pytest.raises(UserError, match=rf"data.{key} \({was}, now {value}\)"):
            write_cache(replace(sampled, data=data))
    with pytest.raises(UserError, match=r"a different number of processes \(1, now 2\)"):
        cached_batches(sampled.data, folder_of(sampled), 0, 2)


def test_other_documents_and_another_tokenizer_are_refused(
    sampled: RunConfig, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "other.txt"
    path.write_text("\n\n".join(texts[::-1]))
    data = replace(sampled.data, source=str(path), folder=str(tmp_path / "prepared"))
    prepare(data, sampled.tokenizer)
    with pytest.raises(UserError, match="a different set of documents"):
        cached_batches(data, folder_of(sampled))
    tokenizer = replace(sampled.tokenizer, path=str(tmp_path / "other.model"))
    theirs = train_tokenizer(texts[:60], tokenizer.path, 400)
    data = replace(sampled.data, folder=str(tmp_path / "other"))
    prepare(data, tokenizer)
    was = read_cache(folder_of(sampled)).order.tokenizer
    found = theirs.fingerprint
    with pytest.raises(
        UserError, match=rf"a different tokenizer \({was[:12]}, now {found[:12]}\); set distill.cache"
    ):
        cached_batches(data, folder_of(sampled))


def test_another_teacher_and_other_settings_are_refused(
    sampled: RunConfig, toy_run: RunConfig, tmp_path: Path
) -> None:
    other = write_teacher(toy_run, vivid(toy_run.model), tmp_path / "other")
    with pytest.raises(
        UserError, match=rf"distill.teacher \({sampled.distill.teacher}, weights .*, now {other}"
    ):
        check_cache(folder_of(sampled), sampled.data, STEPS, teacher=other)
    with pytest.raises(UserError, match=r"distill.teacher \("):
        write_cache(asking(sampled, teacher=other))
    with pytest.raises(UserError, match=r"distill.encoding.entries \(50, now 12\)"):
        check_cache(folder_of(sampled), sampled.data, STEPS, encoding=EncodingConfig(entries=12))
    with pytest.raises(UserError, match=r"a different distill.dtype \(float32, now bfloat16\)"):
        write_cache(asking(sampled, dtype="bfloat16"))
    check_cache(
        folder_of(sampled), sampled.data, STEPS, 1, 1.0, sampled.distill.teacher, sampled.distill.encoding
    )


def test_too_few_rows_are_refused(sampled: RunConfig) -> None:
    with pytest.raises(UserError, match=r"holds 24 rows, but training.steps \(7\) .* needs 28"):
        check_cache(folder_of(sampled), sampled.data, STEPS + 1)
    with pytest.raises(UserError, match="holds no teacher's cache"):
        check_cache(f"{folder_of(sampled)}-none", sampled.data, 1)


def test_rows_that_are_not_those_of_the_data_are_found(
    sampled: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest can be made to fit; the checksum in each record cannot."""
    order = manifest.DataOrder.of(sampled.data, 1)
    monkeypatch.setattr(manifest.DataOrder, "of", lambda *_: order)
    with pytest.raises(UserError, match=r"holds other rows than data\.folder, although"):
        next(cached_batches(replace(sampled.data, seed=1), folder_of(sampled)))


def test_broken_files_are_named(sampled: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of(sampled), tmp_path / "broken")
    file = folder / read_cache(folder).files[1].file
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UserError, match=f"{file} has changed"):
        verify_cache(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{file} is missing or incomplete"):
        read_cache(folder)
    manifest = folder / "manifest.json"
    # An older version's, which knew its teacher by another digest.
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(
        UserError, match=r"has format 2, but .* format 3; delete .*/broken to make it again\.$"
    ):
        read_cache(folder)
    manifest.write_text("{}")
    with pytest.raises(UserError, match="is not the manifest of a teacher's cache"):
        read_cache(folder)


def test_a_broken_record_is_reported_where_it_is_read(sampled: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of(sampled), tmp_path / "broken")
    file = folder / read_cache(folder).files[0].file
    content = bytearray(file.read_bytes())
    record = next(iter(grain.sources.ArrayRecordDataSource([str(file)])))
    content[content.find(record) + len(record) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"distill.cache holds a damaged record"):
        list(cached_batches(sampled.data, str(folder)))


def test_a_full_disk_is_reported_and_whole_files_stay(sampled: RunConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    task = asking(sampled, steps=2, cache=str(tmp_path / "full"))
    write_cache(task)
    before, limit = content(folder_of(task)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"signals-00001-000.arrayrecord could not be written: "):
            write_cache(asking(task, steps=STEPS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(folder_of(task)) == before
    write_cache(asking(task, steps=STEPS))
    assert content(folder_of(task)) == content(folder_of(sampled))


def test_a_cache_that_another_has_written_meanwhile_is_not_written_again(
    sampled: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = asking(sampled, cache=str(tmp_path / "meanwhile"))
    locked = writer.locked

    def written_just_before(folder: str, wait: bool) -> Any:
        shutil.copytree(folder_of(sampled), folder, dirs_exist_ok=True)
        return locked(folder, wait)

    monkeypatch.setattr(writer, "locked", written_just_before)
    with pytest.raises(UserError, match="was changed by another process in the meantime"):
        write_cache(asking(task, steps=2))
    assert content(folder_of(task)) == content(folder_of(sampled))


def test_the_students_layout_decides_how_rows_are_split(task: RunConfig) -> None:
    mesh = MeshConfig(data=1, fsdp=4, sequence=2)
    rows = {"B": ("data", "fsdp", "sequence"), "T": ()}
    layout = replace(task.layout, activations=task.layout.activations | rows)
    with pytest.raises(UserError, match=r"data.batch_size is 4 rows, which mesh.replica"):
        write_cache(replace(task, mesh=mesh, layout=layout))


def test_a_mesh_that_the_batch_does_not_fit_is_refused(task: RunConfig) -> None:
    with pytest.raises(UserError, match=r"data.batch_size is 4 rows, which mesh.replica"):
        write_cache(replace(task, mesh=MeshConfig(8, 1, 1)))


def test_processes_that_the_mesh_does_not_feed_are_refused(
    task: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match=r"mesh divides a batch's rows into 1 parts for 3 processes"):
        write_cache(task)


@pytest.mark.parametrize("lacking", [{"encoding": None}, {"encoding": None, "cache": None}])
def test_a_cache_of_unknown_place_or_content_is_refused(task: RunConfig, lacking: dict[str, None]) -> None:
    with pytest.raises(
        UserError, match=r"distill\.cache and distill\.encoding must be set to write a teacher's"
    ):
        write_cache(asking(task, **lacking))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "full"}, "entries is 50; it must be null for kind full"),
        ({"entries": None}, "entries is null; it must be at least 1 for kind sampled"),
        ({"entries": 0}, "entries is 0"),
        ({"kind": "top_p"}, "p is null; it must be above 0 and at most 1 for kind top_p"),
        ({"p": 0.5}, "p is 0.5; it must be null for kind sampled"),
        ({"kind": "top_p", "p": 1.5}, "p is 1.5"),
        ({"proposal_temperature": 0.5}, "proposal_temperature is 0.5; it must be at least 1"),
        (
            {"kind": "top_k", "proposal_temperature": 2},
            "proposal_temperature is 2, but only kind sampled uses",
        ),
        ({"temperature": 0}, "temperature is 0"),
        ({"weight_bits": 7}, "weight_bits is 7"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"distill.encoding.{message}"):
        EncodingConfig(**settings)


def test_vocabularies_that_do_not_fit_are_refused(toy_config: ModelConfig) -> None:
    large = replace(toy_config, vocab_size=encoding.LARGEST_FULL + 1)
    with pytest.raises(UserError, match="the teacher has 65537 tokens, and full supports at most 65536"):
        check_encoding(EncodingConfig("full", None), large)
    check_encoding(EncodingConfig("full", None), replace(large, vocab_padding=1))
    with pytest.raises(UserError, match="entries is 98; it must be at most 97, the number"):
        check_encoding(EncodingConfig("top_k", 98), toy_config)
