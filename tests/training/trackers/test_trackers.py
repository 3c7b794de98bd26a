"""Trackers: what they are given, that a resumed run continues the same record, and that a failure ends no run."""

import contextvars
import struct
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from gemma2_jax.config import UserError
from gemma2_jax.training.metrics import MetricsConfig, open_writers, read_metrics
from gemma2_jax.training.trackers.tracker import Guarded, TrackedRun

NONE = MetricsConfig(tensorboard=False, wandb_project=None)
BOTH = replace(NONE, wandb_project="study", trackio_project="study")


class Service:
    """Replaces wandb and trackio: runs by id (wandb) or by name (trackio), as these find them.

    Like both, it ends the previous run when another one begins, unless that is asked for in the tracker's own way.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.given: list[dict[str, Any]] = []
        self._current: contextvars.ContextVar[Any] = contextvars.ContextVar("current", default=None)

    def _open(self, key: str) -> Any:
        found = self.runs.setdefault(key, SimpleNamespace(rows=[], finished=0))

        def log(row: dict[str, float], step: int) -> None:
            assert self.runs[key] is not None, "the run was ended by another one"
            found.rows.append((step, row))

        def finish() -> None:
            found.finished += 1

        return SimpleNamespace(key=key, log=log, finish=finish)

    def wandb(self, *, id: str, resume: str, reinit: str = "finish_previous", **given: Any) -> Any:
        if reinit != "create_new":
            self.runs = dict.fromkeys(self.runs)
        self.given.append(given)
        return self._open(id)

    def trackio(self, *, name: str, resume: str, **given: Any) -> Any:
        if (previous := self._current.get()) is not None:
            self.runs[previous] = None
        print("* noise")
        self._current.set(name)
        self.given.append({"name": name, **given})
        return self._open(name)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=found.wandb))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=found.trackio))
    return found


def run(folder: Path, **settings: Any) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return TrackedRun(
        folder, folder.name, {"seed": 1}, group="runs/sweeps/train/seed", tags=("a", "b"), **settings
    )


def test_tensorboard_events(tmp_path: Path) -> None:
    for writer in open_writers(replace(NONE, tensorboard=True), run(tmp_path)):
        writer.write(7, "validation", {"perplexity": 12.5})
        writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [value for event in _events(path) for value in event.summary.value if event.step == 7]
    assert [(value.tag, value.simple_value) for value in values] == [("validation/perplexity", 12.5)]


def _events(path: Path) -> Any:
    """The records of an event file: length, its checksum, content, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_several_trackers_get_name_config_group_and_tags(
    tmp_path: Path, service: Service, capsys: Any
) -> None:
    for writer in open_writers(BOTH, run(tmp_path / "mine")):
        writer.write(1, "train", {"loss": 2.0})
        writer.close()
    wandb, trackio = service.given
    assert (wandb["project"], wandb["name"], wandb["tags"]) == ("study", "mine", ["a", "b"])
    assert (trackio["project"], trackio["name"][:5], len(trackio["name"])) == ("study", "mine-", 11)
    for given in (wandb, trackio):
        assert (given["group"], given["config"]) == ("runs/sweeps/train/seed", {"seed": 1})
    assert [found.rows for found in service.runs.values()] == [[(1, {"train/loss": 2.0})]] * 2
    assert [found.finished for found in service.runs.values()] == [1, 1]
    assert [row["loss"] for row in read_metrics(tmp_path / "mine")] == [2.0]
    assert capsys.readouterr().out == ""  # trackio's own lines go to standard error


def test_a_resumed_run_continues_the_same_record(tmp_path: Path, service: Service) -> None:
    for step in (1, 2):
        for writer in open_writers(BOTH, run(tmp_path / "mine", last_step=step - 1)):
            writer.write(step, "train", {"loss": 2.0})
            writer.close()
    assert [[step for step, _ in found.rows] for found in service.runs.values()] == [[1, 2], [1, 2]]


def test_a_run_of_the_same_name_in_another_folder_has_its_own_record(
    tmp_path: Path, service: Service
) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        for writer in open_writers(BOTH, run(tmp_path / parent / "mine")):
            writer.close()
    assert len(service.runs) == 4


def test_several_runs_of_one_process_are_tracked_at_once(tmp_path: Path, service: Service) -> None:
    both = [open_writers(BOTH, run(tmp_path / name)) for name in ("wide", "deep")]
    for loss, writers in enumerate(both):
        for writer in writers:
            writer.write(1, "train", {"loss": float(loss)})
            writer.close()
    losses = [row["train/loss"] for found in service.runs.values() for _, row in found.rows]
    assert sorted(losses) == [0.0, 0.0, 1.0, 1.0]


class Failing:
    """A tracker that fails when it is opened, at a row, or when it is closed."""

    def __init__(self, when: str) -> None:
        self._when = when
        self._fail("open")

    def write(self, step: int, split: str, row: Any) -> None:
        self._fail("write")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, now: str) -> None:
        if now == self._when:
            raise OSError("no space left\non the disk.")


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_failure_is_shown_once(when: str) -> None:
    shown: list[str] = []
    tracker = Guarded("wandb", lambda: Failing(when), shown.append)
    for step in (1, 2, 3):
        tracker.write(step, "train", {})
    tracker.close()
    tracker.close()
    assert shown == [
        "wandb gets no more metrics, since it failed: no space left on the disk; the run goes on, and metrics.jsonl "
        "has all of them"
    ]


def test_a_tracker_that_does_not_close_keeps_no_run_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2_jax.training.trackers.tracker._LONGEST_CLOSE", 0.01)
    released = threading.Event()
    shown: list[str] = []
    waiting: Any = SimpleNamespace(close=released.wait)
    Guarded("wandb", lambda: waiting, shown.append).close()
    released.set()
    assert shown == ["wandb has not stored all metrics after 0.01 s; metrics.jsonl has all of them"]


def test_the_other_trackers_go_on(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    shown: list[str] = []
    for writer in open_writers(BOTH, run(tmp_path / "mine"), show=shown.append):
        writer.write(1, "train", {"loss": 2.0})
        writer.close()
    assert len(shown) == 1
    assert [found.rows for found in service.runs.values()] == [[(1, {"train/loss": 2.0})]]
    assert len(read_metrics(tmp_path / "mine")) == 1


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_package_that_is_not_installed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    project: dict[str, Any] = {f"{package}_project": "study"}
    config = replace(NONE, **project)
    with pytest.raises(
        UserError, match=rf"^metrics.{package}_project .* pip install 'gemma2_jax\[{package}\]'.$"
    ):
        open_writers(config, run(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shown: list[str] = []
    config = replace(NONE, wandb_project="study")
    both = [open_writers(config, run(tmp_path / name), show=shown.append) for name in ("wide", "deep")]
    for writers in both:
        for writer in writers:
            writer.write(1, "train", {"loss": 2.0})
            writer.close()
    for writer in open_writers(config, run(tmp_path / "wide", last_step=1), show=shown.append):
        writer.write(2, "train", {"loss": 1.0})
        writer.close()
    assert shown == []
    name = (tmp_path / "wide" / "wandb.id").read_text()
    assert len(list((tmp_path / "wide" / "wandb").glob(f"offline-run-*-{name}/*.wandb"))) >= 1


@pytest.mark.thorough
def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    shown: list[str] = []
    config = replace(NONE, trackio_project="study")
    both = [open_writers(config, run(tmp_path / name), show=shown.append) for name in ("wide", "deep")]
    for loss, writers in enumerate(both):
        for writer in writers:
            writer.write(1, "train", {"loss": float(loss)})
            writer.close()
    for writer in open_writers(config, run(tmp_path / "wide", last_step=1), show=shown.append):
        writer.write(2, "train", {"loss": 5.0})
        writer.close()
    assert shown == []
    names = sorted(
        each if isinstance(each, str) else each["name"] for each in SQLiteStorage.get_runs("study")
    )
    assert [name[:5] for name in names] == ["deep-", "wide-"]
    rows = [
        [(row["step"], row["train/loss"]) for row in SQLiteStorage.get_logs("study", name)] for name in names
    ]
    assert rows == [[(1, 1.0)], [(1, 0.0), (2, 5.0)]]
