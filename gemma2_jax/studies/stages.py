"""The stages of a run in a study or sweep: prepare its data, train it, measure it. Each is done only once."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console

from gemma2_jax.checkpoints.store import TOKENIZER_FILE, find, latest_step
from gemma2_jax.config import UserError, build, load_config, read_json, save_config, to_dict, usable
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.shards import find_data_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.teacher_record import read_teacher_record
from gemma2_jax.evaluation.evaluate_run import Evaluation, evaluate_run
from gemma2_jax.files import locked, write_text
from gemma2_jax.formats.load import model_of, open_source
from gemma2_jax.processes.hosts import first_process_first, is_first
from gemma2_jax.run import RunConfig
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.screen import activity
from gemma2_jax.studies.tables import print_line
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import is_number
from gemma2_jax.training.resume import changes, check_same_run
from gemma2_jax.training.start import (
    check_run_folder,
    check_same_data,
    data_identity,
    with_prepared_vocabulary,
)
from gemma2_jax.training.teacher_cache import write_cache

TEACHER_FILE = "teacher.yaml"  # in a distilled run's folder: the configuration of its teacher


@dataclass(frozen=True)
class Measurement:
    """Results of a finished run.

    Attributes:
        evaluation: scores on the validation split.
        samples: one completion for each prompt.
    """

    evaluation: Evaluation
    samples: tuple[str, ...] = ()


def check_unchanged(config: RunConfig, teacher: RunConfig | None = None) -> None:
    """Checks that a run folder was begun with the same configuration and the same teacher.

    Raises:
        UserError: something differs.
    """
    check_run_folder(config)
    check_same_run(config)
    file = Path(config.output) / TEACHER_FILE
    if teacher is None or not file.exists():
        return
    for key, then, value in changes(load_config(RunConfig, file), teacher):
        raise UserError(
            f"{config.output} was distilled from a teacher with {key}={then} ({TEACHER_FILE}), but {teacher.output} is "
            f"configured with {key}={value}; give another output, or delete {config.output} to train it again."
        )


def prepare_all(configs: Sequence[RunConfig], console: Console) -> None:
    """Prepares the data of all runs, each distinct data set once."""
    for data, tokenizer in dict.fromkeys((config.data, config.tokenizer) for config in configs):
        manifest = find_data_manifest(data.folder)
        done = manifest is not None and manifest.complete
        _print_stage(console, "data", data.folder, "already prepared, skipped" if done else "preparing")
        with first_process_first():
            prepare(data, tokenizer)


def cache_teacher(config: RunConfig, console: Console) -> None:
    """Writes the teacher cache that a run is distilled from, or the rest of it."""
    _print_stage(console, "cache", config.name, f"{config.distill.cache}")
    write_cache(with_prepared_vocabulary(config))


def train_run(
    config: RunConfig, console: Console, teacher: RunConfig | None = None, until: int | None = None
) -> None:
    """Trains a run, or the rest of it.

    Args:
        teacher: configuration of the run that it is distilled from.
        until: as in `train`.
    """
    check_unchanged(config, teacher)
    check_same_data(config.output, config.data)
    found, steps = find(config.output), config.training.steps
    if found is not None and found.step >= (steps if until is None else until):
        _print_stage(console, "train", config.name, "already done, skipped")
        return
    part = f"{steps} steps" if until in (None, steps) else f"to step {until} of {steps}"
    _print_stage(console, "train", config.name, f"{part} in {config.output}")
    train(config, until=until)
    # Written after training, so that a rejected run leaves no files. A stopped run records its teacher's weights.
    if teacher is not None and is_first():
        save_config(teacher, Path(config.output) / TEACHER_FILE)


def measure_run(
    config: RunConfig,
    console: Console,
    reference: RunConfig | None = None,
    prompts: Sequence[str] = (),
    sample_tokens: int = 1,
    teacher: str | None = None,
) -> Measurement:
    """Evaluates a trained run and samples completions of the prompts.

    A stored measurement under the same conditions is returned instead.

    Args:
        reference: configuration of the run that the predictions are compared with.
        teacher: checkpoint of the run's teacher to compare with, if there is no `reference`.
    """
    file = Path(config.output) / "evaluation.json"
    conditions = {
        "step": latest_step(config.output),
        "reference": _teacher_identity(config, teacher) if reference is None else to_dict(reference),
        "prompts": list(prompts),
        "sample_tokens": sample_tokens,
        "data": data_identity(config.data),
    }
    stored = _stored(file)
    then = stored["conditions"]
    if _same_reference(then.get("reference"), reference):
        then = {**then, "reference": conditions["reference"]}
    if then == conditions:
        _print_stage(console, "evaluate", config.name, "already done, skipped")
        return Measurement(_evaluation(stored["evaluation"], file), tuple(stored["samples"]))
    _print_stage(console, "evaluate", config.name, "on the validation split")
    # A log has the line above; a terminal also shows a clock.
    with activity(f"evaluating {config.name}", show=is_first() and sys.stderr.isatty()):
        evaluation = evaluate_run(config.output, teacher if reference is None else reference.output)
        samples = _continue(config, prompts, sample_tokens) if prompts else []
    record = {"conditions": conditions, "evaluation": dataclasses.asdict(evaluation), "samples": samples}
    if is_first():
        write_text(file, json.dumps(record, ensure_ascii=False, indent=1))
    return Measurement(evaluation, tuple(samples))


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Adds the seconds spent inside to those of `stage` in the folder's times.json."""
    start = monotonic()
    try:
        yield
    finally:
        if is_first():
            seconds = read_times(folder)
            seconds[stage] = seconds.get(stage, 0.0) + monotonic() - start
            write_text(folder / "times.json", json.dumps(seconds, indent=1))


def read_times(folder: Path) -> dict[str, float]:
    """Returns the seconds of each stage of the study in `folder`, summed over all commands that ran it."""
    file = folder / "times.json"
    times = read_json(file) if file.exists() else {}
    if not isinstance(times, dict) or not all(is_number(spent) for spent in times.values()):
        raise UserError(f"{file} holds no times of stages; delete it, and only the times so far are lost.")
    return times


@contextmanager
def exclusive_command(folder: str | Path) -> Iterator[None]:
    """Prevents other commands from working on the same study or sweep at the same time.

    Raises:
        UserError: another command is working on it.
    """
    if not is_first():
        yield
        return
    with ExitStack() as stack:
        try:
            with usable("output", folder):
                stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another `gemma2 run` or `gemma2 sweep`; wait for it, or give another output=."
            ) from None
        yield


def _teacher_identity(config: RunConfig, teacher: str | None) -> Any:
    """Returns the identity of the weights of a run's teacher, which may have been moved since."""
    if teacher is None:
        return None
    record = read_teacher_record(config.output)
    return {"teacher": teacher if record is None else record.identity}


def _stored(file: Path) -> dict[str, Any]:
    """Returns the stored measurement of a run; one without conditions if there is none."""
    stored = read_json(file) if file.exists() else {"conditions": {}, "evaluation": {}, "samples": []}
    kinds = {"conditions": dict, "evaluation": dict, "samples": list}
    if not isinstance(stored, dict) or not all(
        isinstance(stored.get(key), kind) for key, kind in kinds.items()
    ):
        raise _no_measurement(file)
    return stored


def _evaluation(stored: Mapping[str, Any], file: Path) -> Evaluation:
    """Builds an Evaluation from stored values. Older files call the cross-entropy `loss`."""
    values = {"cross_entropy" if name == "loss" else name: value for name, value in stored.items()}
    try:
        if all(value is None or is_number(value) for value in values.values()):
            return Evaluation(**values)
    except TypeError:  # a name is missing, or unknown
        pass
    raise _no_measurement(file)


def _no_measurement(file: Path) -> UserError:
    return UserError(
        f"{file} holds no scores of a run; delete it, and the same command evaluates the run again."
    )


def _same_reference(stored: Mapping[str, Any] | None, reference: RunConfig | None) -> bool:
    """Whether the stored reference run has the same configuration as `reference`, whatever their folders."""
    if stored is None or reference is None or "teacher" in stored:
        return False
    return not any(changes(build(RunConfig, stored, "evaluation.json"), reference))


def _continue(config: RunConfig, prompts: Sequence[str], sample_tokens: int) -> list[str]:
    tokenizer = Tokenizer.load(Path(config.output) / TOKENIZER_FILE)
    sampler = Sampler(model_of(open_source(config.output), "float32"), tokenizer, config.compute)
    return sampler.generate(
        list(prompts), SamplingConfig(max_new_tokens=sample_tokens, temperature=0.7, seed=0)
    )


def _print_stage(console: Console, stage: str, what: str, text: str) -> None:
    print_line(console, f"{stage:<10} {what}: {text}")
