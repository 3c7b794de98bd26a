"""Checkpoints of a run: train state, data iterator and config as one, written by Orbax in the background.

    RUN/checkpoints/<step>/params      nested dict of arrays, laid out like model/weights.py
                          /optimizer   the optimizer's state
                          /matching    whatever else a method trains, by its name, and its optimizer's state, if any
                          /data        where the data iterator stands, from each process
                          /_CHECKPOINT_METADATA   the resolved config, the step, and what of it is not reported yet
                          /manifest.json   sizes and checksums of all files, see `integrity.py`

Orbax writes into a temporary folder and renames it, so a checkpoint is whole or not there. What happens to its files
later, a copy that is cut off or a disk that fails, is found by its manifest: such a checkpoint does not count, and the
one before it is used. Everything restores into an abstract target, which fixes shapes, dtypes and shardings: a
checkpoint moves between meshes.
"""

import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from gemma2_jax.checkpoints.failures import reading_checkpoint, writing_checkpoint
from gemma2_jax.checkpoints.integrity import ANNOUNCED, changed, missing, write_checkpoint_manifest
from gemma2_jax.checkpoints.paths import check_path
from gemma2_jax.checkpoints.trees import array_metadata, check_all_trees, check_trees, name_of
from gemma2_jax.config import UserError, build, read_yaml
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.narrowing import check_restored
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, abstract_params, weight_specs
from gemma2_jax.processes.hosts import first_finding, is_first, wait_for_all
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

FOLDER = "checkpoints"
CONFIG_FILE = "config.yaml"  # the whole configuration of the run
TOKENIZER_FILE = "tokenizer.model"  # a copy of its tokenizer
PARAMS = "params"  # the tree that a model is read from
_ITERATOR = "data"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name for the file
_UNREPORTED = "unreported"
_stores = itertools.count()


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
class FoundCheckpoint:
    """A checkpoint that can be read.

    Attributes:
        step: of the run.
        path: its folder.
        passed_over: what is wrong with the newer ones, a clause each.
    """

    step: int
    path: Path
    passed_over: tuple[str, ...] = ()


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
    """The checkpoints in one run folder. A context manager: leaving it waits for what is being written.

    Attributes:
        latest_step: of the checkpoint that was saved or restored last; before, of the newest whole one. None without.
    """

    def __init__(self, run_folder: str | Path, keep: int):
        check_path(run_folder)
        self.latest_step = latest_step(run_folder)
        folder = Path(run_folder).absolute() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._saving = 0  # the step of the save in progress
        self._checkpointer = _checkpointer(
            folder, lambda: self._saving, preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._broken: list[Path] = []  # newer than the one that was restored
        self._pending: Any = None  # Orbax's response for the save in progress

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        iterator: Any,
        config: Mapping[str, Any],
        unreported: Unreported = Unreported(),
    ) -> None:
        """Start saving and return; arrays may be donated and the iterator moved on as soon as this returns."""
        if self._broken:
            self._set_aside()
        self.wait()  # for the previous save, whose step is in `_saving`
        self._saving = step
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            {**trees, _ITERATOR: iterator},
            force=True,
            custom_metadata={**_about(config), _UNREPORTED: asdict(unreported)},
        )
        self.latest_step = step

    def wait(self) -> None:
        """Returns when all that `save` has begun is written."""
        pending, self._pending = self._pending, None  # a failure is raised once
        if pending is not None:
            pending.result()  # which alone ends the response's thread
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
                f"{path} cannot be read; delete {path.parent} to go on from the previous checkpoint."
            ) from None

    def restore(self, step: int, abstract_trees: Mapping[str, Any], iterator: Any) -> dict[str, Any]:
        """The trees saved at `step`, laid out as their abstract versions; `iterator` is moved to where it stood.

        The checkpoint is one that `find` gave. Newer ones, which are not whole, stay until the first `save`.

        Raises:
            UserError: a tree or an array is missing, superfluous or of another shape, or a file is damaged.
        """
        folder = Path(self._checkpointer.directory)
        path = folder / str(step)
        check_all_trees(path, abstract_trees, {_ITERATOR}, folder.parent)
        with reading_checkpoint(path):
            restored = ocp.load_checkpointables(path, abstract_trees)
        iterator.set_state(_iterator_state(path / _ITERATOR))
        self.latest_step = step
        self._broken = [folder / str(newer) for newer in _steps(folder) if newer > step]
        return {name: restored[name] for name in abstract_trees}

    def _set_aside(self) -> None:
        """Renames the newer ones that are not whole: Orbax would count them as the newest, and keep them instead."""
        if is_first():
            for path in self._broken:
                aside = path.with_name(f"{path.name}.broken")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        wait_for_all("broken checkpoints")
        self._checkpointer.reload()
        self._broken = []


def checkpoint_steps(run_folder: str | Path) -> list[int]:
    """The steps that have a checkpoint in a run folder, whole or not, the newest first."""
    return _steps(Path(run_folder) / FOLDER)


def latest_step(run_folder: str | Path, tree: str | None = None) -> int | None:
    """The step of the newest checkpoint in a run folder that is whole, or of which one tree is; or None."""
    folder = Path(run_folder) / FOLDER
    return next((step for step in _steps(folder) if missing(folder / str(step), tree) is None), None)


def find(run_folder: str | Path, tree: str | None = None, contents: bool = True) -> FoundCheckpoint | None:
    """The newest checkpoint in a run folder that is whole, or of which one tree is; None if there is none of any kind.

    Args:
        contents: compare the files with their checksums too, each process of a job reading some of them: all processes
            call this together. Else only what is there, and of what size.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    check_path(run_folder)
    folder = Path(run_folder).absolute() / FOLDER
    passed_over: list[str] = []
    for step in _steps(folder):
        path = folder / str(step)
        wrong = missing(path, tree)
        if contents:
            own = wrong or changed(path, tree, jax.process_index(), jax.process_count())
            wrong = first_finding(own)
        if wrong is None:
            return FoundCheckpoint(step, path, tuple(passed_over))
        passed_over.append(f"{path} is not whole ({wrong})")
    if passed_over:
        raise UserError(
            f"{run_folder} holds no whole checkpoint: {'; '.join(passed_over)}; copy {folder} again, or delete it to "
            "train from the start."
        )
    return None


def find_params(run_folder: str | Path) -> FoundCheckpoint:
    """As `find`, for the parameters alone, and says on standard error which checkpoints it passes over.

    Raises:
        UserError: there is no checkpoint, or of none the parameters are whole.
    """
    found = find(run_folder, PARAMS)
    if found is None:
        raise _no_checkpoint(run_folder)
    if found.passed_over and is_first():
        print(f"{'; '.join(found.passed_over)}: {found.path} is used.", file=sys.stderr, flush=True)
    return found


def restore_params(run_folder: str | Path, target: Params) -> Params:
    """The newest parameters of a run, as `target` has them: shapes, dtype and shardings.

    Raises:
        UserError: there is no checkpoint, it holds other shapes or values beyond what the target's dtype can hold, or a
            file is damaged.
    """
    return read_params(find_params(run_folder), target)


def read_params(found: FoundCheckpoint, target: Params) -> Params:
    """The parameters of a checkpoint that `find_params` gave, as `target` has them. Raises as `restore_params`."""
    check_trees(found.path, {PARAMS: target})

    def read(target: Params) -> Params:
        with reading_checkpoint(found.path / PARAMS):
            params: Params = ocp.load_checkpointables(found.path, {PARAMS: target})[PARAMS]
        return params

    loaded = read(target)
    check_restored(loaded, array_metadata(found.path, PARAMS), read, str(found.path / PARAMS))
    return loaded


def describe_params(run_folder: str | Path) -> tuple[FoundCheckpoint, dict[str, jax.ShapeDtypeStruct]]:
    """The newest parameters of a run, and their shapes and dtypes as they are saved, by path, without reading them.

    Raises:
        UserError: there is no checkpoint, or none of a run.
    """
    found = find(run_folder, PARAMS, contents=False)
    if found is None:
        raise _no_checkpoint(run_folder)
    leaves, _ = jax.tree_util.tree_flatten_with_path(array_metadata(found.path, PARAMS))
    return found, {name_of(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def save_params(run_folder: str | Path, params: Params, config: Mapping[str, Any]) -> None:
    """Write parameters alone, as step 0 of a run folder that has no checkpoint yet; returns when they are written.

    Raises:
        OSError: the disk does not take them.
    """
    check_path(run_folder)
    folder = Path(run_folder).absolute() / FOLDER
    folder.mkdir(parents=True)
    with writing_checkpoint(folder), _checkpointer(folder, lambda: 0) as checkpointer:
        checkpointer.save_checkpointables(0, {PARAMS: params}, custom_metadata=_about(config))


def load_model_config(run_folder: str | Path) -> ModelConfig:
    """The model section of a run's config.yaml."""
    path = Path(run_folder) / CONFIG_FILE
    if not path.exists() and checkpoint_steps(run_folder):
        raise UserError(
            f"{path} is missing, which describes the model in {path.with_name(FOLDER)}; copy it there from where the "
            "run was trained."
        )
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
    return Gemma2(config, restore_params(run_folder, abstract_params(weight_specs(config), dtype, mesh)))


def _checkpointer(folder: Path, saving: Callable[[], int], **options: Any) -> ocp.training.Checkpointer:
    """Orbax's, which ends each checkpoint with its manifest; `saving` gives the step of the save in progress.

    Processes that wait for one another in one store are kept apart from those in another that is open beside it: stores
    are made in the same order in all processes, and numbered.
    """

    def finish() -> None:
        # Called when the files of all processes are written, before their folder gets its name.
        step = saving()
        write_checkpoint_manifest(next(folder.glob(f"{step}.orbax-checkpoint-tmp*"), folder / str(step)))

    context = ocp.Context()
    context.async_options.post_finalization_callback = finish
    context.multiprocessing.barrier_sync_key_prefix = f"store{next(_stores)}"
    return ocp.training.Checkpointer(folder, context=context, **options)


def _no_checkpoint(run_folder: str | Path) -> UserError:
    folder = Path(run_folder) / FOLDER
    lacks = "" if folder.is_dir() else f", and {folder} is missing"
    return UserError(f"{run_folder} holds no checkpoint; expected one in {folder}/<step>{lacks}.")


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself in _CHECKPOINT_METADATA."""
    return {"config": dict(config), **ANNOUNCED}


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder of them, whole or not, the newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name) for path in found if re.fullmatch("[0-9]+", path.name)), reverse=True)


def _iterator_state(folder: Path) -> Any:
    """The states of all processes put together; Orbax asks for that of the same process among as many."""
    try:
        states = [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("process_*.json"))
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read as the state of the data: {error}.") from None
    if not states:
        raise UserError(f"{folder} lacks process_0.json, the state of the data.")
    return reduce(_merged, states)


def _merged(state: Any, other: Any) -> Any:
    if not (isinstance(state, dict) and isinstance(other, dict)):
        return state  # what several processes have is the same
    return {**other, **{key: _merged(value, other.get(key)) for key, value in state.items()}}
