"""Only intact checkpoints count; damage to their files by copies and disks is detected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.integrity import MANIFEST, changed, missing
from gemma2_jax.checkpoints.store import (
    CheckpointStore,
    FoundCheckpoint,
    checkpoint_steps,
    find,
    find_params,
    latest_step,
    read_params,
    restore_params,
)
from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import train_batches

Damage = Callable[[Path], object]


def trees(step: float) -> dict[str, Any]:
    """Arrays filled with the number of their step."""
    return {"params": {"w": jnp.full((40, 50), step)}, "optimizer": {"m": jnp.full(30, step)}}


def abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


@pytest.fixture(scope="module")
def written(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    iterator = train_batches(data)
    with CheckpointStore(folder, keep=3) as store:
        for step in (1, 2, 3):
            store.save(step, trees(step), iterator, {"seed": 0})
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def files_of(checkpoint: Path, tree: str = "") -> list[Path]:
    return sorted(path for path in (checkpoint / tree).rglob("*") if path.is_file())


def arrays(checkpoint: Path) -> Path:
    """The file that the parameters are in."""
    return max(files_of(checkpoint, "params"), key=lambda file: file.stat().st_size)


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


def test_the_manifest_names_every_file_of_every_tree(written: Path) -> None:
    checkpoint = written / "checkpoints" / "3"
    named = json.loads((checkpoint / MANIFEST).read_text())["files"]
    found = {str(file.relative_to(checkpoint)) for file in files_of(checkpoint)}
    assert {name.split("/")[0] for name in named} == {"params", "optimizer", "data"}
    assert {name for name in found if "/" in name} == set(named)
    assert missing(checkpoint) is None
    assert changed(checkpoint) is None


def delete(*files: Path) -> None:
    for file in files:
        file.unlink()


def delete_folders(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def put_a_file_in_the_place_of(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGES: dict[str, Damage] = {
    "all files deleted": lambda path: delete(*files_of(path)),
    "all files emptied": lambda path: [file.write_bytes(b"") for file in files_of(path)],
    "an array's file deleted": lambda path: delete(arrays(path)),
    "an array's file emptied": lambda path: cut(arrays(path), 0),
    "an array's file cut": lambda path: cut(arrays(path), -1),
    "the manifest deleted": lambda path: delete(path / MANIFEST),
    "the manifest cut": lambda path: cut(path / MANIFEST, 200),
    "the manifest of something else": lambda path: (path / MANIFEST).write_text("[1, 2]"),
    "the trees deleted": lambda path: delete_folders(*filter(Path.is_dir, path.iterdir())),
    "no folder": put_a_file_in_the_place_of,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_one_before_is_used_and_both_are_named(
    run: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "3"
    damage(newest)
    assert latest_step(run) == 2
    found = find(run)
    assert found is not None
    assert found.step == 2
    assert f"{newest} is not intact (" in found.skipped[0]
    loaded = restore_params(run, abstract(trees(0)["params"]))
    np.testing.assert_array_equal(loaded["w"], np.full((40, 50), 2.0))
    output = capsys.readouterr().err
    assert f"{newest} is not intact" in output
    assert f"{run / 'checkpoints' / '2'} is used" in output


def test_any_flipped_bit_is_found(run: Path) -> None:
    checkpoint = run / "checkpoints" / "3"
    named = json.loads((checkpoint / MANIFEST).read_text())["files"]
    for number, name in enumerate(named):
        content = (checkpoint / name).read_bytes()
        flip(checkpoint / name, number / len(named))
        assert missing(checkpoint) is None
        assert changed(checkpoint) == f"{name} has changed since it was written"
        (checkpoint / name).write_bytes(content)
    assert changed(checkpoint) is None


def test_flipped_bits_are_not_restored(run: Path) -> None:
    flip(arrays(run / "checkpoints" / "3"))
    assert latest_step(run) == 3  # nothing was read
    found = find(run)
    assert found is not None
    assert found.step == 2
    assert "has changed since it was written" in found.skipped[0]
    np.testing.assert_array_equal(
        restore_params(run, abstract(trees(0)["params"]))["w"], np.full((40, 50), 2.0)
    )


def test_each_process_reads_some_of_the_files(run: Path) -> None:
    checkpoint = run / "checkpoints" / "3"
    named = sorted(json.loads((checkpoint / MANIFEST).read_text())["files"])
    flip(checkpoint / named[4])
    assert [changed(checkpoint, share=share, shares=3) is None for share in range(3)] == [True, False, True]


def test_weights_are_read_where_only_the_optimizer_is_not_whole(run: Path) -> None:
    for file in files_of(run / "checkpoints" / "3", "optimizer"):
        file.unlink()
    assert latest_step(run) == 2
    assert latest_step(run, "params") == 3
    assert find_params(run).step == 3


def test_parameters_that_were_copied_alone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "checkpoints" / "3" / "params", tmp_path / "checkpoints" / "3" / "params")
    assert find_params(tmp_path) == FoundCheckpoint(3, tmp_path / "checkpoints" / "3")
    np.testing.assert_array_equal(
        read_params(find_params(tmp_path), abstract(trees(0)["params"]))["w"], np.full((40, 50), 3.0)
    )
    assert latest_step(tmp_path) is None  # nothing to train on from
    arrays(tmp_path / "checkpoints" / "3").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"holds no intact checkpoint: .*/3 is not intact \(params/.* is empty\)"
    ):
        find_params(tmp_path)


def as_older(checkpoint: Path) -> None:
    """Turns a checkpoint into one of an older version, which wrote no manifest."""
    (checkpoint / MANIFEST).unlink()
    file = checkpoint / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    del about["custom_metadata"]["manifest"]
    file.write_text(json.dumps(about))


def test_an_older_checkpoint_has_no_manifest(run: Path) -> None:
    checkpoint = run / "checkpoints" / "3"
    as_older(checkpoint)
    found = find(run)
    assert found is not None
    assert found.step == 3
    files = [file for file in files_of(checkpoint) if file.relative_to(checkpoint).parts[1:]]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(b"")
        assert missing(checkpoint) == f"{file.relative_to(checkpoint)} is empty"
        file.write_bytes(content)
    (checkpoint / "params" / "manifest.ocdbt").unlink()
    assert latest_step(run) == 2


def test_a_damaged_older_checkpoint_is_one_sentence(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_older(run / "checkpoints" / "3")
    file = arrays(run / "checkpoints" / "3")
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(
        UserError, match=r"checkpoints/3/params cannot be read as a checkpoint of a run: .*\.$"
    ):
        restore_params(run, abstract(trees(0)["params"]))
    assert caplog.text == ""


def test_none_is_whole(run: Path) -> None:
    for step in (1, 2, 3):
        arrays(run / "checkpoints" / str(step)).unlink()
    for ask in (find, find_params):
        with pytest.raises(
            UserError, match=r"holds no intact checkpoint: .*/3 is not intact .*/2 .*/1 .*copy .* again"
        ):
            ask(run)
    assert latest_step(run) is None


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    with pytest.raises(UserError, match=r"holds no checkpoint; .*/checkpoints is missing"):
        find_params(tmp_path)
    (tmp_path / "checkpoints" / "note").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no checkpoint; expected one in .*/checkpoints/<step>"):
        find_params(tmp_path)


def test_more_files_do_no_harm(run: Path) -> None:
    (run / "checkpoints" / "3" / "params" / ".DS_Store").write_text("")
    (run / "checkpoints" / "3" / "note.txt").write_text("mine")
    (run / "checkpoints" / "²").mkdir()
    assert latest_step(run) == 3


def test_a_linked_checkpoint(written: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "3").symlink_to(written / "checkpoints" / "3")
    assert find_params(tmp_path).step == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_training_goes_on_over_a_broken_one(run: Path, data: DataConfig, keep: int) -> None:
    arrays(run / "checkpoints" / "3").write_bytes(b"")
    iterator = train_batches(data)
    with CheckpointStore(run, keep) as store:
        assert store.latest_step == 2
        restored = store.restore(2, abstract(trees(0)), iterator)
        np.testing.assert_array_equal(restored["optimizer"]["m"], np.full(30, 2.0))
        assert (run / "checkpoints" / "3").exists()  # until there is something newer
        store.save(3, trees(3), iterator, {"seed": 0})
        store.save(4, trees(4), iterator, {"seed": 0})
        assert store.latest_step == 4
    assert checkpoint_steps(run) == [4, 3][:keep]
    assert (run / "checkpoints" / "3.broken").is_dir()
    assert find(run) == FoundCheckpoint(4, run / "checkpoints" / "4")


def test_an_error_of_the_iterator_stays_itself(run: Path) -> None:
    class Wrong:
        def set_state(self, state: Any) -> None:
            raise TypeError("of the caller")

    with CheckpointStore(run, keep=3) as store, pytest.raises(TypeError, match="of the caller"):
        store.restore(3, abstract(trees(0)), Wrong())
