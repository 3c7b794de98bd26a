"""Checkpoints of a run: train state, data iterator and config as a unit, written by Orbax in the background.

    RUN/checkpoints/<step>/params      nested dict of arrays, structured like model/weights.py
                          /optimizer   the optimizer's state
                          /averaged    the average of the parameters over the steps, if the run keeps one
                          /matching    other trees that a method trains, by name, with both of these, if any
                          /data        the data iterator's state, one file per process
                          /_CHECKPOINT_METADATA   the resolved config, step, method, and metrics not yet reported
                          /manifest.json   sizes and checksums of all files, see `integrity.py`

Orbax writes into a temporary folder and then renames it, so a checkpoint is either complete or absent. The manifest
reveals damage that happens later, such as an interrupted copy or a failing disk: a checkpoint that is not intact is
skipped, and the one before it is used. Everything is restored into an abstract target, which fixes shapes, dtypes and
shardings, so a checkpoint can be restored on another mesh.
"""

import itertools
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from gemma2_jax.checkpoints.checkpoint_metadata import Unreported, metadata_of, metadata_of_run, read_method
from gemma2_jax.checkpoints.chunks import storage_options
from gemma2_jax.checkpoints.failures import reading_checkpoint, writing_checkpoint
from gemma2_jax.checkpoints.integrity import changed, missing, write_checkpoint_manifest
from gemma2_jax.checkpoints.iterator_state import iterator_state
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
CONFIG_FILE = "config.yaml"  # the run's complete configuration
TOKENIZER_FILE = "tokenizer.model"  # a copy of its tokenizer
PARAMS = "params"  # the tree that a model is read from
AVERAGED = "averaged"  # the tree of its average over the steps of training
_ITERATOR = "data"
_stores = itertools.count()


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep. The last step of a run is always saved.

    Attributes:
        every: number of steps between checkpoints.
        keep: number of newest checkpoints to keep; older ones are deleted.
        grace_seconds: seconds that a run stopped by a signal (Ctrl-C, SIGTERM) has to finish and save its step; 0
            stops it at once. Keep it below the time that a cluster allows between SIGTERM and SIGKILL, usually 30 s.
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
        step: step of the run.
        path: folder of the checkpoint.
        skipped: the defect of each newer checkpoint, one clause each, such as "PATH is not intact (…)".
    """

    step: int
    path: Path
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints in one run folder. A context manager, which waits on exit until pending saves are written.

    Attributes:
        latest_step: step of the checkpoint that was saved or restored last, at first of the newest intact one; None if
            there is none.
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
        self._broken: list[Path] = []  # checkpoints newer than the restored one
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
        unreported: Unreported | None = None,
        method: str | None = None,
    ) -> None:
        """Starts saving; as soon as this returns, arrays may be donated and the iterator advanced.

        Args:
            unreported: none by default.
            method: as in `read_method`.
        """
        if self._broken:
            self._set_aside()
        self.wait()  # for the previous save, whose step is in `_saving`
        self._saving = step
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            {**trees, _ITERATOR: iterator},
            force=True,
            custom_metadata=metadata_of_run(config, unreported or Unreported(), method),
        )
        self.latest_step = step

    def wait(self) -> None:
        """Waits until every save that has begun is written."""
        pending, self._pending = self._pending, None  # a failure is raised once
        if pending is not None:
            pending.result()  # which alone ends the response's thread
        self._checkpointer.wait()

    def restore(self, step: int, abstract_trees: Mapping[str, Any], iterator: Any) -> dict[str, Any]:
        """Returns the trees saved at `step`, with the abstract trees' dtypes and shardings; restores `iterator`.

        The checkpoint must be one that `find` returned. Newer ones, which are not intact, stay until the first `save`.

        Raises:
            UserError: a tree or an array is missing, superfluous or of another shape, or a file is damaged.
        """
        folder = Path(self._checkpointer.directory)
        path = folder / str(step)
        check_all_trees(path, abstract_trees, {_ITERATOR}, folder.parent)
        with reading_checkpoint(path):
            restored = ocp.load_checkpointables(path, abstract_trees)
        iterator.set_state(iterator_state(path / _ITERATOR))
        self.latest_step = step
        self._broken = [folder / str(newer) for newer in _steps(folder) if newer > step]
        return {name: restored[name] for name in abstract_trees}

    def _set_aside(self) -> None:
        """Renames newer checkpoints that are not intact: Orbax would count them as the newest and keep only them."""
        if is_first():
            for path in self._broken:
                aside = path.with_name(f"{path.name}.broken")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        wait_for_all("broken checkpoints")
        self._checkpointer.reload()
        self._broken = []


def checkpoint_steps(run_folder: str | Path) -> list[int]:
    """Returns the steps that have a checkpoint in a run folder, intact or not, newest first."""
    return _steps(Path(run_folder) / FOLDER)


def latest_step(run_folder: str | Path, tree: str | None = None) -> int | None:
    """Returns the step of a run's newest intact checkpoint, or newest with an intact `tree`; None if there is none."""
    folder = Path(run_folder) / FOLDER
    return next((step for step in _steps(folder) if missing(folder / str(step), tree) is None), None)


def saved_method(run_folder: str | Path, default: str | None) -> str | None:
    """Returns `read_method` of a run's newest intact checkpoint; `default` if there is none."""
    step = latest_step(run_folder)
    return default if step is None else read_method(Path(run_folder) / FOLDER / str(step), default)


def find(run_folder: str | Path, tree: str | None = None, contents: bool = True) -> FoundCheckpoint | None:
    """Returns a run's newest intact checkpoint, or its newest with an intact `tree`; None without checkpoints.

    Args:
        contents: whether to compare checksums too, each process reading a share of the files; all processes must then
            call this together. Otherwise only the existence and sizes of the files are checked.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    check_path(run_folder)
    folder = Path(run_folder).absolute() / FOLDER
    skipped: list[str] = []
    for step in _steps(folder):
        path = folder / str(step)
        wrong = missing(path, tree)
        if contents:
            own = wrong or changed(path, tree, jax.process_index(), jax.process_count())
            wrong = first_finding(own)
        if wrong is None:
            return FoundCheckpoint(step, path, tuple(skipped))
        skipped.append(f"{path} is not intact ({wrong})")
    if skipped:
        raise UserError(
            f"{run_folder} holds no intact checkpoint: {'; '.join(skipped)}; copy {folder} again, or delete it to "
            "train from the start."
        )
    return None


def find_params(run_folder: str | Path, tree: str = PARAMS) -> FoundCheckpoint:
    """Like `find`, for the parameters alone; prints on standard error which damaged checkpoints it skips.

    Args:
        tree: PARAMS, or AVERAGED for their average.

    Raises:
        UserError: there is no checkpoint, or none with intact parameters.
    """
    found = _find_params(run_folder, tree)
    if found.skipped and is_first():
        print(f"{'; '.join(found.skipped)}: {found.path} is used.", file=sys.stderr, flush=True)
    return found


def _find_params(run_folder: str | Path, tree: str, contents: bool = True) -> FoundCheckpoint:
    folder = Path(run_folder) / FOLDER
    steps = _steps(folder)
    if tree == AVERAGED and steps and not any((folder / str(step) / tree).is_dir() for step in steps):
        raise UserError(
            f"{run_folder} keeps no average of its weights, as a run with training.ema=0.999 does; leave out "
            "--averaged to take the weights themselves."
        )
    found = find(run_folder, tree, contents)
    if found is None:
        lacks = "" if folder.is_dir() else f", and {folder} is missing"
        raise UserError(f"{run_folder} holds no checkpoint; expected one in {folder}/<step>{lacks}.")
    return found


def restore_params(run_folder: str | Path, target: Params, tree: str = PARAMS) -> Params:
    """Returns the newest parameters (`tree` of `find_params`) with the shapes, dtype and shardings of `target`.

    Raises:
        UserError: there is no checkpoint, its shapes differ, a value exceeds the range of the target's dtype, or a file
            is damaged.
    """
    return read_params(find_params(run_folder, tree), target, tree)


def read_params(found: FoundCheckpoint, target: Params, tree: str = PARAMS) -> Params:
    """Returns the parameters of a checkpoint that `find_params` found; arguments and errors as in `restore_params`."""
    check_trees(found.path, {tree: target})

    def read(target: Params) -> Params:
        with reading_checkpoint(found.path / tree):
            params: Params = ocp.load_checkpointables(found.path, {tree: target})[tree]
        return params

    loaded = read(target)
    check_restored(loaded, array_metadata(found.path, tree), read, str(found.path / tree))
    return loaded


def describe_params(
    run_folder: str | Path, tree: str = PARAMS
) -> tuple[FoundCheckpoint, dict[str, jax.ShapeDtypeStruct]]:
    """Returns a run's newest checkpoint and the saved shape and dtype of each parameter, by path, without reading them.

    Args:
        tree: as in `find_params`.

    Raises:
        UserError: there is no checkpoint, or it is not a run's.
    """
    found = _find_params(run_folder, tree, contents=False)
    leaves, _ = jax.tree_util.tree_flatten_with_path(array_metadata(found.path, tree))
    return found, {name_of(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def save_params(run_folder: str | Path, params: Params, config: Mapping[str, Any]) -> None:
    """Writes parameters alone, as step 0 of a run folder without a checkpoint; returns when they are written.

    Raises:
        OSError: they cannot be written.
    """
    check_path(run_folder)
    folder = Path(run_folder).absolute() / FOLDER
    folder.mkdir(parents=True)
    with writing_checkpoint(folder), _checkpointer(folder, lambda: 0) as checkpointer:
        checkpointer.save_checkpointables(0, {PARAMS: params}, custom_metadata=metadata_of(config))


def load_model_config(run_folder: str | Path) -> ModelConfig:
    """Returns the model config in a run's config.yaml. Raises UserError if the file or its section is missing."""
    path = Path(run_folder) / CONFIG_FILE
    if not path.exists() and checkpoint_steps(run_folder):
        raise UserError(
            f"{path}, which describes the model in {path.with_name(FOLDER)}, is missing; copy it from the original "
            "run folder."
        )
    if not path.exists():
        raise UserError(f"{run_folder} is not a run folder: it has no {CONFIG_FILE}.")
    config = read_yaml(path)
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no section `model`.")
    return build(ModelConfig, config["model"], f"{path}, model")


def load_model(run_folder: str | Path, dtype: Any = "float32", mesh: Mesh | None = None) -> Gemma2:
    """Returns the newest model of a run.

    Args:
        dtype: dtype that the weights are converted to; they are saved as float32.
        mesh: mesh to place the model on; by default only the first device of this process.
    """
    config = load_model_config(run_folder)
    if mesh is None:
        mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
    return Gemma2(config, restore_params(run_folder, abstract_params(weight_specs(config), dtype, mesh)))


def _checkpointer(folder: Path, saving: Callable[[], int], **options: Any) -> ocp.training.Checkpointer:
    """Returns an Orbax checkpointer that adds the manifest to each checkpoint.

    Stores are numbered, and created in the same order in all processes, so that barriers of stores that are open at
    the same time do not mix.

    Args:
        saving: returns the step of the save in progress.
    """

    def finish() -> None:
        # Called when the files of all processes are written, before their folder gets its final name.
        step = saving()
        write_checkpoint_manifest(next(folder.glob(f"{step}.orbax-checkpoint-tmp*"), folder / str(step)))

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage_options
    context.async_options.post_finalization_callback = finish
    context.multiprocessing.barrier_sync_key_prefix = f"store{next(_stores)}"
    return ocp.training.Checkpointer(folder, context=context, **options)


def _steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in a `checkpoints` folder, intact or not, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name) for path in found if re.fullmatch("[0-9]+", path.name)), reverse=True)
