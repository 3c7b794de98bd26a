"""Checkpoints of a run: train state, data iterator and config as one, written by Orbax in the background.

    RUN/checkpoints/<step>/params      nested dict of arrays, laid out like model/weights.py
                          /optimizer   the optimizer's state
                          /matching    projections of distillation's matching and their optimizer's state, if any
                          /data        where the data iterator stands, from each process
                          /_CHECKPOINT_METADATA   the resolved config, the step, and what of it is not reported yet

Orbax writes into a temporary folder and renames it, so a checkpoint is whole or not there. Everything
restores into an abstract target, which fixes shapes, dtypes and shardings: a checkpoint moves between meshes.
"""

import gc
import inspect
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from gemma2_jax.config import UserError, build, read_yaml
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

FOLDER = "checkpoints"
CONFIG_FILE = "config.yaml"  # the whole configuration of the run
TOKENIZER_FILE = "tokenizer.model"  # a copy of its tokenizer
_ITERATOR = "data"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name for the file
_UNREPORTED = "unreported"
_PATIENCE = 30  # seconds


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much to keep. The last step of a run is always saved.

    Attributes:
        every: steps between checkpoints.
        keep: the newest so many checkpoints stay; older ones are deleted.
        grace_seconds: a run that is stopped by a signal (Ctrl-C, SIGTERM) has so many seconds to end its step and save
            it; 0 stops it at once. Keep it below what a cluster grants between SIGTERM and SIGKILL, mostly 30 s.
    """

    every: int
    keep: int
    grace_seconds: float = 25.0  # Older runs lack this key.

    def __post_init__(self) -> None:
        if not 0 <= self.grace_seconds < math.inf:
            raise UserError(
                f"checkpoint.grace_seconds is {self.grace_seconds}; it must be a number of seconds, 0 or more."
            )
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class Unreported:
    """What a run that was stopped between two rows of metrics has still to report.

    Attributes:
        rows: the metrics of each step since the last row, of which the next row is the average.
        seconds: that these steps took.
        evaluated: False if the evaluation that was due at the step of the checkpoint was cut short.
    """

    rows: Sequence[Mapping[str, float]] = ()
    seconds: float = 0.0
    evaluated: bool = True


class CheckpointStore:
    """The checkpoints in one run folder. A context manager: leaving it waits for what is being written."""

    def __init__(self, run_folder: str | Path, keep: int):
        folder = Path(run_folder).absolute() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            folder, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        iterator: Any,
        config: Mapping[str, Any],
        unreported: Unreported = Unreported(),
    ) -> None:
        """Start saving and return; arrays may be donated and the iterator moved on as soon as this returns."""
        self._checkpointer.save_checkpointables_async(
            step,
            {**trees, _ITERATOR: iterator},
            force=True,
            custom_metadata={"config": dict(config), _UNREPORTED: asdict(unreported)},
        )

    def wait(self) -> None:
        """Returns when all that `save` has begun is written."""
        self._checkpointer.wait()

    def unreported(self, step: int) -> Unreported:
        """What `save` was given beside the step; nothing in older checkpoints.

        Raises:
            UserError: its file cannot be read.
        """
        path = Path(self._checkpointer.directory) / str(step) / _METADATA
        try:
            custom = json.loads(path.read_text(encoding="utf-8"))["custom_metadata"]
            return Unreported(**custom.get(_UNREPORTED, {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path} cannot be read; delete {path.parent} to go on from the checkpoint before."
            ) from None

    def restore(self, step: int, abstract_trees: Mapping[str, Any], iterator: Any) -> dict[str, Any]:
        """The trees saved at `step`, laid out as their abstract versions; `iterator` is moved to where it stood.

        Raises:
            UserError: an array is missing, superfluous or of another shape, or a file is damaged.
        """
        path = Path(self._checkpointer.directory) / str(step)
        _check_trees(path, abstract_trees)
        with _reading(path):
            restored = self._checkpointer.load_checkpointables(step, abstract_trees)
            iterator.set_state(_iterator_state(path / _ITERATOR))
        return {name: restored[name] for name in abstract_trees}


def latest_step(run_folder: str | Path) -> int | None:
    """The step of the newest whole checkpoint in a run folder, or None."""
    folder = Path(run_folder) / FOLDER
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def load_params(run_folder: str | Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """The newest parameters of a run, as `target` has them: shapes, dtype and shardings.

    Raises:
        UserError: there is no checkpoint, it holds other shapes, or a file is damaged.
    """
    path = _newest(run_folder)
    _check_trees(path, {"params": target})
    with _reading(path / "params"):
        loaded: dict[str, Any] = ocp.load_checkpointables(path, {"params": target})["params"]
    return loaded


def describe_params(run_folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the newest parameters of a run as they are saved, by path, without reading them.

    Raises:
        UserError: there is no checkpoint, or none of ours.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(_metadata(_newest(run_folder), "params"))
    return {_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def save_params(run_folder: str | Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write parameters alone, as step 0 of a run folder that has no checkpoint yet; returns when they are written.

    Raises:
        OSError: the disk does not take them.
    """
    folder = Path(run_folder).absolute() / FOLDER
    folder.mkdir(parents=True)
    with (
        _orbax(partial(_not_written, folder)),
        ocp.training.Checkpointer(folder) as checkpointer,
    ):
        checkpointer.save_checkpointables(0, {"params": params}, custom_metadata={"config": dict(config)})


def load_model_config(run_folder: str | Path) -> ModelConfig:
    """The model section of a run's config.yaml."""
    path = Path(run_folder) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{run_folder} is not a run folder: it has no {CONFIG_FILE}.")
    config = read_yaml(path)
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no section `model`.")
    return build(ModelConfig, config["model"], f"{path}, model")


def load_model(run_folder: str | Path, dtype: Any = "float32", mesh: Mesh | None = None) -> Gemma2:
    """A run's newest model.

    Args:
        dtype: that the weights are converted to; they are saved as float32.
        mesh: that it is laid out on; by default the first device of this process alone.
    """
    config = load_model_config(run_folder)
    if mesh is None:
        mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
    return Gemma2(config, load_params(run_folder, abstract_params(config, dtype, mesh)))


def _iterator_state(folder: Path) -> Any:
    """The states of all processes put together; Orbax asks for that of the same process among as many."""
    files = sorted(folder.glob("process_*.json"))
    if not files:
        raise ValueError("the state of the data is not there")
    return reduce(_merged, (json.loads(file.read_text(encoding="utf-8")) for file in files))


def _merged(state: Any, other: Any) -> Any:
    if not (isinstance(state, dict) and isinstance(other, dict)):
        return state  # what several processes have is the same
    return {**other, **{key: _merged(value, other.get(key)) for key, value in state.items()}}


def _newest(run_folder: str | Path) -> Path:
    step = latest_step(run_folder)
    if step is None:
        raise UserError(
            f"{run_folder} holds no checkpoint; expected one in {Path(run_folder) / FOLDER}/<step>."
        )
    return Path(run_folder).absolute() / FOLDER / str(step)


def _metadata(path: Path, tree: str) -> Any:
    """What a checkpoint says about the arrays of one of its trees."""
    with _reading(path / tree):
        found = ocp.metadata(path, tree).metadata
        if found is None:  # Orbax's word for a tree whose files it cannot read
            raise ValueError("its files are damaged or not all there")
    return found


def _reading(path: Path) -> AbstractContextManager[None]:
    """Tells in one sentence that Orbax cannot read what is at `path`."""
    return _orbax(lambda reason: UserError(f"{path} cannot be read as a checkpoint of ours: {reason}."))


@contextmanager
def _orbax(told: Callable[[str], Exception]) -> Iterator[None]:
    """Raises what `told` makes of the reason where Orbax fails, in the place of all that it says and raises itself."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_leftovers(unraisable: Any) -> None:
        if not _is_left_over(unraisable):
            hook(unraisable)

    sys.unraisablehook = without_leftovers
    reason = None
    try:
        yield
    except Exception as error:  # whatever the code that met the broken file does, wrapped several times
        reason = _reason(error)
    finally:
        if reason is not None:
            gc.collect()  # tasks that failed beside the first one complain when they go
        else:
            # After a failure it stays: reads beside the first that failed end at any later time, and find nobody.
            sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if reason is not None:
        raise told(reason)


def _is_left_over(unraisable: Any) -> bool:
    """Whether it comes of what Orbax gave up: a read that finds its event loop closed, or one of its coroutines."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(unraisable.exc_traceback)]
    if inspect.iscoroutine(unraisable.object):
        codes.append(unraisable.object.cr_code)
    in_orbax = any("/orbax/checkpoint/" in code.co_filename for code in codes)
    return in_orbax or str(unraisable.exc_value) == "Event loop is closed"


def _not_written(folder: Path, reason: str) -> OSError:
    """The error of a folder that could not be written whole, once nothing in it changes any more.

    Orbax fails with the first write that does, and cannot be asked to wait for the others: they would make files, and
    folders for them, in the place of those that the caller then removes.
    """
    before: set[tuple[str, int]] | None = None
    for _ in range(_PATIENCE):
        found = set()
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_mtime_ns))
        if found == before:
            break
        before = found
        time.sleep(1.0)
    return OSError(reason)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".")


def _check_trees(path: Path, targets: Mapping[str, Any]) -> None:
    """Compare what a checkpoint holds with what is wanted, before any of it is read."""
    for tree, target in targets.items():
        found = _shapes(_metadata(path, tree))
        wanted = _shapes(target)
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                raise UserError(f"{path}/{tree} lacks {name} of shape {wanted[name]}.")
            if name not in wanted:
                raise UserError(f"{path}/{tree} holds {name}, which this configuration does not have.")
            if found[name] != wanted[name]:
                raise UserError(
                    f"{path}/{tree} holds {name} of shape {found[name]}, where this configuration has {wanted[name]}."
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
