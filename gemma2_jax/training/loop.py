"""One run from its configuration to its last step."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax import stops
from gemma2_jax.checkpoints.store import FOLDER, find, latest_step
from gemma2_jax.compilation import use_compilation_cache
from gemma2_jax.config import UserError, to_dict, usable
from gemma2_jax.distill.teacher_record import check_same_teacher
from gemma2_jax.files import locked
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.method import Method, ModelMethod
from gemma2_jax.processes.hosts import HostsConfig, check_agreement, is_first
from gemma2_jax.processes.sharing import check_shared
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.going_on import check_same_run
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.overview import describe_runs
from gemma2_jax.training.packages import check_packages
from gemma2_jax.training.profile import Profile
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.run_folder import Folder, RunFolder
from gemma2_jax.training.start import (
    as_prepared,
    check_batch,
    check_data,
    check_folder,
    check_same_data,
    check_same_inputs,
    data_identity,
    names_other_teacher,
    write_inputs,
)
from gemma2_jax.training.trainer import Trainer

OpenFolder = Callable[[Mesh, TrainingProgress, ExitStack], Folder]


def train(config: RunConfig, method: ModelMethod | None = None) -> None:
    """Trains to `config.training.steps`, going on from the newest checkpoint in the run folder if there is one.

    Writes config.yaml, tokenizer.model, data.json, teacher.json (of a student), metadata.json (if the checkpoint that
    it begins with, or else its teacher, has some), metrics.jsonl, tensorboard/ and checkpoints/ into config.output.
    A run that is done already is left as it is.

    Args:
        method: what the run learns; by default what the configuration asks for (`build_method`).

    Raises:
        UserError: data, teacher, mesh or checkpoint do not fit the configuration, or the loss is not finite.
    """
    (config,) = prepared([config])
    with stops.resuming(partial(how_to_go_on, [config])):
        check_begun(config)
        if is_done(config):
            check_teacher_of_done(config)
            return
        check_same_inputs([config])
        chosen: ModelMethod = build_method(config) if method is None else method
        train_method(chosen, [config], partial(RunFolder, config, chosen), config.training.steps)


def prepared(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configurations that all processes of the job train, with the vocabulary of the prepared data.

    Raises:
        UserError: a package is missing, or the processes differ in what they were given or have on disk.
    """
    # Which processes there are belongs to the job, and not to what it trains.
    configs = [as_prepared(replace(config, hosts=HostsConfig())) for config in configs]
    for config in configs:
        check_packages(config)
    check_agreement(_what_decides(configs))
    return configs


def check_begun(config: RunConfig) -> None:
    """Raises UserError if the run folder holds another run, or one of other data."""
    check_folder(config)
    check_same_run(config)
    check_same_data(config.output, config.data)


def is_done(config: RunConfig) -> bool:
    """Whether a run is at its last step, and evaluated there: one that was to be longer may not be.

    The checkpoint's files are read: one that is damaged has to be trained again.
    """
    steps, folder = config.training.steps, Path(config.output)
    found = find(folder) if latest_step(folder) == steps else None
    if found is None or found.step != steps:
        return False
    rows = read_metrics(folder) if (folder / JSON_LINES).is_file() else None
    return rows is None or any((row["step"], row["split"]) == (steps, "validation") for row in rows)


def how_to_go_on(configs: Sequence[RunConfig]) -> str:
    """What the same command does after a stop."""
    steps = {config.output: latest_step(config.output) for config in configs}
    saved = [f"step {step} of {output}" for output, step in steps.items() if step is not None]
    if not saved:
        return "no step is saved yet, and the same command begins anew"
    return f"the same command goes on from {' and '.join(saved)}"


def check_teacher_of_done(config: RunConfig) -> None:
    """Raises UserError if a run that is done names another teacher than its own.

    It has to be loaded for that, and so is only where it has another name, or place, than when the run was trained.
    """
    if not names_other_teacher(config):
        return
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh), laid_out(config.layout):
        method = build_method(config)
        method.examples(feeding_share(mesh))
        record = method.record(method.load_frozen(check_data(config), mesh))
    check_same_teacher(config.output, config.distill, record)


def train_method(method: Method, configs: Sequence[RunConfig], open_folder: OpenFolder, until: int) -> None:
    """Trains by a method, up to a step.

    Args:
        configs: of the runs that the method trains, which share all that is asked of the first one here.
        open_folder: opens the folder of a run, or those of all runs, when they are locked.
    """
    config = configs[0]
    mesh = build_mesh(config.mesh)
    for each in configs:
        check_batch(each, mesh)
        tokenizer = check_data(each)
    with jax.set_mesh(mesh), laid_out(config.layout), ExitStack() as stack:
        stack.enter_context(use_compilation_cache(config.compilation_cache))
        if is_first():
            for each in configs:
                _take_folder(each, stack)
        check_shared([("output", each.output) for each in configs])
        name = config.name if len(configs) == 1 else f"{len(configs)} runs"
        progress = stack.enter_context(TrainingProgress(name, config.training.steps, show=is_first()))
        for line in describe_runs(configs, mesh):
            progress.say(line)
        with progress.doing("opening the data"):
            examples = method.examples(feeding_share(mesh))
        with progress.doing(
            "loading frozen weights", brief=not jax.tree.leaves(method.abstract_frozen(mesh))
        ):
            frozen = method.load_frozen(tokenizer, mesh)
        for line in method.describe(frozen):
            progress.say(line)
        record = method.record(frozen)
        for each in configs:
            check_same_teacher(each.output, each.distill, record)
        folder = open_folder(mesh, progress, stack)
        trainer = Trainer(config, method, folder, examples, frozen, tokenizer, mesh, progress)
        folder.open_writers(stack)
        if is_first():
            for each in configs:
                write_inputs(each, record)  # now that nothing was refused
        trainer.train(until, stack.enter_context(Profile(config, progress.say)))


def _take_folder(config: RunConfig, stack: ExitStack) -> None:
    """Locks the run folder until the stack is closed. If the run is refused until then, nothing of it is left."""
    try:
        with usable("output", config.output):
            stack.enter_context(locked(config.output, wait=False))
    except BlockingIOError:
        raise UserError(
            f"{config.output} is being trained by another process; wait for it, or choose another output."
        ) from None
    stack.enter_context(stops.cleanup(partial(_remove_empty, Path(config.output, FOLDER))))


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # there is something in it, or it is not there
        folder.rmdir()


def _what_decides(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """What all processes must have in common for their steps to be those of one program."""
    found = {f"{config.name}: {key}": value for config in configs for key, value in to_dict(config).items()}
    steps = {f"the newest checkpoint in {config.output}": latest_step(config.output) for config in configs}
    folder = configs[0].data.folder
    data = {
        f"{name} of data.folder {folder}": value for name, value in data_identity(configs[0].data).items()
    }
    return found | steps | data
