"""Trains one run, from its configuration to its last step."""

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
from gemma2_jax.files import locked
from gemma2_jax.methods.choose import build_method, method_class
from gemma2_jax.methods.method import Method, ModelMethod
from gemma2_jax.processes.hosts import HostsConfig, check_agreement, is_first
from gemma2_jax.processes.sharing import check_shared
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.overview import describe_runs
from gemma2_jax.training.packages import check_packages
from gemma2_jax.training.profile import Profile
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.resume import check_same_run
from gemma2_jax.training.run_folder import Folder, RunFolder
from gemma2_jax.training.start import (
    check_batch,
    check_built_from,
    check_data,
    check_run_folder,
    check_same_data,
    check_same_inputs,
    check_same_method,
    checked_base,
    data_identity,
    is_changed,
    with_prepared_vocabulary,
    write_inputs,
)
from gemma2_jax.training.trainer import Trainer

OpenFolder = Callable[[Mesh, TrainingProgress, ExitStack], Folder]


def train(config: RunConfig, method: ModelMethod | None = None, until: int | None = None) -> None:
    """Trains to `config.training.steps`, resuming from the newest checkpoint in the run folder if there is one.

    Writes config.yaml, tokenizer.model, data.json, the method's record (such as teacher.json), metadata.json (if
    initialise.source or else the teacher has one), metrics.jsonl, tensorboard/ and checkpoints/ into config.output. A
    finished run is left unchanged.

    Args:
        method: training method; the one that the configuration selects by default (`build_method`).
        until: an earlier step to stop at, with a checkpoint. Schedules stay those of all steps, so a later call
            continues as if there had been no stop.

    Raises:
        UserError: data, teacher, mesh, checkpoint or method do not fit the configuration, or the loss is not finite.
    """
    if method is not None:
        check_built_from(method, config)
    (config,) = prepare_configs([config])
    with stops.resuming(partial(resume_message, [config])):
        check_existing_run(config, method)
        if is_done(config):
            check_inputs_of_finished(config)
            return
        check_same_inputs([config])
        chosen: ModelMethod = build_method(config) if method is None else method
        last = config.training.steps if until is None else min(until, config.training.steps)
        train_method(chosen, [config], partial(RunFolder, config, chosen), last)


def prepare_configs(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Returns the configurations with the vocabulary of the prepared data, after checking that all processes agree.

    Raises:
        UserError: a package is missing, or the processes have different configurations, data or checkpoints.
    """
    # The processes are a property of the job, not of the run.
    configs = [with_prepared_vocabulary(replace(config, hosts=HostsConfig())) for config in configs]
    for config in configs:
        check_packages(config)
    check_agreement(_shared_settings(configs))
    return configs


def check_existing_run(config: RunConfig, method: ModelMethod | None = None) -> None:
    """Raises UserError if the run folder holds another run, or a run on other data.

    Args:
        method: the run's method; None for the one that its configuration selects.
    """
    check_run_folder(config)
    check_same_run(config)
    check_same_method(config, method)
    check_same_data(config.output, config.data)


def is_done(config: RunConfig) -> bool:
    """Whether a run has reached its last step and been evaluated there.

    A run whose training.steps was lowered may still lack that evaluation. The checkpoint's files are verified, since a
    damaged checkpoint has to be trained again.
    """
    steps, folder = config.training.steps, Path(config.output)
    found = find(folder) if latest_step(folder) == steps else None
    if found is None or found.step != steps:
        return False
    rows = read_metrics(folder) if (folder / JSON_LINES).is_file() else None
    return rows is None or any((row["step"], row["split"]) == (steps, "validation") for row in rows)


def resume_message(configs: Sequence[RunConfig]) -> str:
    """Describes what the same command does after a stop."""
    steps = {config.output: latest_step(config.output) for config in configs}
    saved = [f"step {step} of {output}" for output, step in steps.items() if step is not None]
    if not saved:
        return "no step is saved yet; the same command starts from the beginning"
    return f"the same command resumes from {' and '.join(saved)}"


def check_inputs_of_finished(config: RunConfig) -> None:
    """Raises UserError if a finished run is configured with other frozen weights than it was trained with.

    This loads them, so it is skipped if their paths are those that the run was trained with.
    """
    if is_changed(config, {"initialise.source"}):
        checked_base(config)
    record_file = method_class(config).record_file
    if record_file is None or not is_changed(config, record_file.sources):
        return
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh), laid_out(config.layout):
        method = build_method(config)
        method.examples(feeding_share(mesh))
        record = method.record(method.load_frozen(check_data(config), mesh))
    if record is not None:
        record.check(config)


def train_method(method: Method, configs: Sequence[RunConfig], open_folder: OpenFolder, until: int) -> None:
    """Trains one or several runs with a method, up to step `until`.

    Args:
        configs: configurations of the runs that the method trains; everything that is taken from the first one here is
            the same in all of them.
        open_folder: opens the folders of the runs; called after they are locked.
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
                _lock_folder(each, stack)
        check_shared([("output", each.output) for each in configs])
        name = config.name if len(configs) == 1 else f"{len(configs)} runs"
        progress = stack.enter_context(TrainingProgress(name, config.training.steps, show=is_first()))
        for line in describe_runs(configs, mesh):
            progress.print_line(line)
        with progress.doing("opening the data"):
            examples = method.examples(feeding_share(mesh))
        with progress.doing(
            "loading frozen weights", brief=not jax.tree.leaves(method.abstract_frozen(mesh))
        ):
            frozen = method.load_frozen(tokenizer, mesh)
        for line in method.describe(frozen):
            progress.print_line(line)
        record = method.record(frozen)
        if record is not None:
            for each in configs:
                record.check(each)
        needed = any(each.adaptation.has_base for each in configs)
        with progress.doing("identifying base models", brief=not needed):
            bases = {each.output: checked_base(each) for each in configs}
        folder = open_folder(mesh, progress, stack)
        trainer = Trainer(config, method, folder, examples, frozen, tokenizer, mesh, progress)
        folder.open_writers(stack)
        if is_first():
            for each in configs:
                # Only now, after all checks have passed.
                write_inputs(each, bases[each.output])
                if record is not None:
                    record.save(each)
        trainer.train(until, stack.enter_context(Profile(config, progress.print_line)))


def _lock_folder(config: RunConfig, stack: ExitStack) -> None:
    """Locks the run folder until the stack is closed; then removes the checkpoint folder if it is still empty."""
    try:
        with usable("output", config.output):
            stack.enter_context(locked(config.output, wait=False))
    except BlockingIOError:
        raise UserError(
            f"output {config.output} is being trained by another process; wait for it, or choose another output."
        ) from None
    stack.enter_context(stops.cleanup(partial(_remove_empty, Path(config.output, FOLDER))))


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or does not exist
        folder.rmdir()


def _shared_settings(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """Everything that must be the same in all processes for them to run the same program on the same data."""
    found = {f"{config.name}: {key}": value for config in configs for key, value in to_dict(config).items()}
    steps = {f"the newest checkpoint in {config.output}": latest_step(config.output) for config in configs}
    folder = configs[0].data.folder
    data = {
        f"{name} of data.folder {folder}": value for name, value in data_identity(configs[0].data).items()
    }
    return found | steps | data
