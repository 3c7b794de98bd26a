"""Sweeps: one run for each combination of values, one after another."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.processes.hosts import is_first
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.stages import (
    Measurement,
    exclusive_command,
    measure_run,
    prepare_all,
    timed,
    train_run,
)
from gemma2_jax.studies.sweep_report import Result, write_sweep_report
from gemma2_jax.studies.tables import print_line

ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Combination:
    """One combination of a sweep.

    Attributes:
        values: values by key.
        config: the run's configuration with these values.
    """

    values: Mapping[str, str]
    config: RunConfig


def run_sweep(combinations: Sequence[Combination], output: str, console: Console) -> bool:
    """Runs the unfinished combinations of a sweep and reports all of them, lowest validation cross-entropy first.

    If a combination fails, its traceback is written to error.txt in its folder and the sweep continues. With several
    processes, a failure ends the sweep.

    Args:
        output: the sweep's folder. Receives table.md, summary.png, loss.png, results.json and times.json.

    Returns:
        Whether every combination has a result.

    Raises:
        UserError: another command is working in the same folder.
    """
    folder = Path(output)
    results = []
    with exclusive_command(folder):
        for number, combination in enumerate(combinations, 1):
            shown = " ".join(f"{key}={value}" for key, value in combination.values.items())
            print_line(console, f"{number} of {len(combinations)}: {shown}", "bold")
            config, found = combination.config, None
            try:
                found = _run(config, folder, console)
            except Exception as error:  # an error of any type fails this combination only
                stops.check()  # unless it was caused by a signal, which stops the whole sweep
                if jax.process_count() > 1:
                    raise  # the error may be in this process only, and the others cannot continue without it
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                write_text(Path(config.output) / ERROR_FILE, traceback.format_exc())
                print_line(console, f"failed     {reason}", "red")
                results.append(Result(combination.values, config.output, error=reason))
            else:
                results.append(Result(combination.values, config.output, found.evaluation))
        if is_first():
            write_sweep_report(results, folder, console)
    return all(result.error is None for result in results)


def _run(config: RunConfig, folder: Path, console: Console) -> Measurement:
    prepare_all([config], console)
    with timed(folder, f"train {config.output}"):
        train_run(config, console)
    measurement = measure_run(config, console, teacher=config.distill.teacher)
    (Path(config.output) / ERROR_FILE).unlink(missing_ok=True)  # from an earlier try
    return measurement
