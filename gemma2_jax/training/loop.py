"""The one training loop: a step for each run that is trained, then what each has to report."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax import stops
from gemma2_jax.checkpoints.store import FOLDER, find, latest_step
from gemma2_jax.compilation import programs_kept_in
from gemma2_jax.config import UserError, to_dict, usable
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import locked
from gemma2_jax.sharding.agreed_stop import AgreedStop, stopping_together
from gemma2_jax.sharding.hosts import HostsConfig, check_agreement, is_first
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.sharding.sharing import check_shared
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.going_on import check_same_run
from gemma2_jax.training.inputs import Inputs
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.overview import describe_runs, describe_teacher
from gemma2_jax.training.profile import Profile
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.start import (
    as_prepared,
    check_batch,
    check_data,
    check_folder,
    check_same_data,
    check_same_inputs,
    check_together,
    data_identity,
    names_other_teacher,
    write_inputs,
)
from gemma2_jax.training.taught_by import check_same_teacher
from gemma2_jax.training.trainer import Trainer


def train(config: RunConfig) -> None:
    """Train to `config.training.steps`, going on from the newest checkpoint in the run folder if there is one.

    Writes config.yaml, tokenizer.model, data.json, teacher.json (of a student), metadata.json (if the checkpoint that
    it begins with, or else its teacher, has some), metrics.jsonl, tensorboard/ and checkpoints/ into config.output.
    A run that is done already is left as it is.

    Raises:
        UserError: data, teacher, mesh or checkpoint do not fit the configuration, or the loss is not finite.
    """
    train_together([config])


def train_together(configs: Sequence[RunConfig]) -> None:
    """Trains several runs at once, which share their data and, if they have a teacher, one forward pass of it a step.

    Each ends as it would alone, but for rounding, in its own folder. Those that are ahead, after a stop, wait for
    the others.

    Raises:
        UserError: as `train`; or the runs do not go together.
    """
    # Which processes there are belongs to the job, and not to what it trains.
    configs = [as_prepared(replace(config, hosts=HostsConfig())) for config in configs]
    check_together(configs)
    check_agreement(_what_decides(configs))
    with stops.resuming(partial(_goes_on, configs)):
        _train_what_is_left(configs)


def _train_what_is_left(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        check_folder(config)
        check_same_run(config)
        check_same_data(config.output, config.data)
    done = [config for config in configs if _is_done(config)]
    left = [config for config in configs if config not in done]
    if not any(config.distill.teaches for config in left):
        _check_teacher_of(done)
    if left:
        check_same_inputs(left)
        _train(left, done)


def _is_done(config: RunConfig) -> bool:
    """Whether a run is at its last step, and evaluated there: one that was to be longer may not be.

    The checkpoint's files are read: one that is damaged has to be trained again.
    """
    steps, folder = config.training.steps, Path(config.output)
    found = find(folder) if latest_step(folder) == steps else None
    if found is None or found.step != steps:
        return False
    rows = read_metrics(folder) if (folder / JSON_LINES).is_file() else None
    return rows is None or any((row["step"], row["split"]) == (steps, "validation") for row in rows)


def _goes_on(configs: Sequence[RunConfig]) -> str:
    """What the same command does after a stop."""
    steps = {config.output: latest_step(config.output) for config in configs}
    saved = [f"step {step} of {output}" for output, step in steps.items() if step is not None]
    if not saved:
        return "no step is saved yet, and the same command begins anew"
    return f"the same command goes on from {' and '.join(saved)}"


def _check_teacher_of(done: Sequence[RunConfig]) -> None:
    """Raises UserError if runs that are done, beside which nobody is taught, name another teacher than their own.

    It has to be loaded for that, and so is only where it has another name, or place, than when they were trained.
    """
    moved = [config for config in done if names_other_teacher(config)]
    if not moved:
        return
    mesh = build_mesh(moved[0].mesh)
    with jax.set_mesh(mesh), laid_out(moved[0].layout):
        taught_by = Inputs(moved[:1], check_data(moved[0]), mesh).taught_by
    for config in moved:
        check_same_teacher(config, taught_by)


def _train(left: Sequence[RunConfig], done: Sequence[RunConfig]) -> None:
    """Trains what is left of the runs, if those that are done were taught by the same."""
    mesh = build_mesh(left[0].mesh)
    for config in left:
        check_batch(config, mesh)
        tokenizer = check_data(config)
    with jax.set_mesh(mesh), laid_out(left[0].layout), ExitStack() as stack:
        stack.enter_context(programs_kept_in(left[0].compilation_cache))
        if is_first():
            for config in left:
                _take_folder(config, stack)
        check_shared([("output", config.output) for config in left])
        name = left[0].name if len(left) == 1 else f"{len(left)} runs"
        progress = stack.enter_context(TrainingProgress(name, left[0].training.steps, show=is_first()))
        for line in describe_runs(left, mesh):
            progress.say(line)
        trainers = []
        for fed_the_same in _fed_the_same(left):
            with progress.doing(
                "opening the data" if fed_the_same[0].distill.teacher is None else "loading the teacher"
            ):
                inputs = Inputs(fed_the_same, tokenizer, mesh)
            teacher = describe_teacher(fed_the_same[0], inputs.judge)
            if teacher is not None:
                progress.say(teacher)
            for config in [*fed_the_same, *done]:
                check_same_teacher(config, inputs.taught_by)
            trainers += _build_trainers(fed_the_same, inputs, tokenizer, mesh, progress, stack)
        for trainer in trainers:
            trainer.open_writers(stack)
        if is_first():
            for trainer in trainers:
                write_inputs(trainer.config, trainer.inputs.taught_by)  # now that nothing was refused
        _run(trainers, progress, stack.enter_context(Profile(left[0], progress.say)))


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


def _fed_the_same(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Those that are taught, and those that are not.

    The latter have inputs of their own, although of the same batches: they get nothing of the teacher, and where they
    stand in the data is saved without the others' cache, as by a run alone. The price is that each batch is read and
    sent to the devices twice, which is little beside a step.
    """
    groups = [[config for config in configs if config.distill.teaches is taught] for taught in (True, False)]
    return [group for group in groups if group]


def _build_trainers(
    configs: Sequence[RunConfig],
    inputs: Inputs,
    tokenizer: Tokenizer,
    mesh: Mesh,
    progress: TrainingProgress,
    stack: ExitStack,
) -> list[Trainer]:
    """Of runs that share their inputs, which stand where the one that is furthest behind has to go on."""
    begin = inputs.batches.get_state()
    found = {config.output: find(config.output) for config in configs}

    def step(config: RunConfig) -> int:
        checkpoint = found[config.output]
        return 0 if checkpoint is None else checkpoint.step

    trainers = []
    for config in sorted(configs, key=step, reverse=True):
        inputs.batches.set_state(begin)
        trainers.append(Trainer(config, inputs, tokenizer, mesh, progress, stack, found[config.output]))
    return trainers


def _run(trainers: Sequence[Trainer], progress: TrainingProgress, profile: Profile) -> None:
    """Takes all steps that are left; a signal ends it behind one of them, which is saved."""
    steps = trainers[0].config.training.steps
    grace = max(trainer.config.checkpoint.grace_seconds for trainer in trainers)
    with stopping_together(grace, progress.say) as stop:
        for trainer in trainers:
            trainer.evaluate_if_due(stop)  # what an earlier stop has cut short
        _stop_if_due(stop, trainers)
        for step in range(min(trainer.step for trainer in trainers), steps):
            stepping = [trainer for trainer in trainers if trainer.step == step]
            with profile.step(step + 1, settle=partial(_wait_for, stepping)):
                _take_steps(stepping)
            progress.advance(step + 1)
            # All clocks are stopped before the first run is evaluated.
            for trainer in stepping:
                trainer.settle()
            _report(stepping, len(trainers), stop)
            _stop_if_due(stop, trainers)


def _stop_if_due(stop: AgreedStop, trainers: Sequence[Trainer]) -> None:
    if not stop.is_due():
        return
    broken = []
    for trainer in trainers:
        try:
            trainer.save_what_is_left()
        except UserError as error:
            broken.append(error)
    if broken:
        raise broken[0]
    stops.check()


def _take_steps(trainers: Sequence[Trainer]) -> None:
    for inputs in dict.fromkeys(trainer.inputs for trainer in trainers):
        fed = next(inputs)
        for trainer in trainers:
            if trainer.inputs is inputs:
                trainer.take_step(*fed)


def _report(trainers: Sequence[Trainer], together: int, stop: AgreedStop) -> None:
    """Raises UserError if a loss is not finite: when the others have saved what is due, so that they can go on."""
    broken = {}
    for trainer in trainers:
        try:
            trainer.report(stop)
        except UserError as error:
            broken[trainer.config.name] = error
    if broken:
        first = next(iter(broken.values()))
        if len(broken) == together:
            raise first
        without = " ".join(f"--student {name}" for name in broken)
        raise UserError(
            f"{str(first).removesuffix('.')}; without {without}, the same command goes on with the others."
        )


def _wait_for(trainers: Sequence[Trainer]) -> None:
    jax.block_until_ready([trainer.state for trainer in trainers])
