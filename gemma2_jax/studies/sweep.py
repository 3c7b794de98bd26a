"""A sweep: one run for each combination of values, one after another."""

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
from gemma2_jax.studies.stages import Measurement, measure_run, prepare_all, sole_command, timed, train_run
from gemma2_jax.studies.sweep_report import Result, write_sweep_report
from gemma2_jax.studies.tables import say

ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Combination:
    """One combination of a sweep: the values that it sets, and the run's configuration."""

    values: Mapping[str, str]
    config: RunConfig


def run_sweep(combinations: Sequence[Combination], output: str, console: Console) -> bool:
    """Runs what is missing of a sweep and reports all of it, the lowest validation cross-entropy first.

    A combination that fails is reported, its traceback kept as error.txt in its folder, and the rest goes on; but with
    several processes it ends the sweep.

    Args:
        output: the sweep's folder; gets table.md, summary.png, loss.png, results.json and times.json.

    Returns:
        Whether every combination has a result.

    Raises:
        UserError: another sweep works in the same folder.
    """
    folder = Path(output)
    results = []
    with sole_command(folder):
        for number, combination in enumerate(combinations, 1):
            shown = " ".join(f"{key}={value}" for key, value in combination.values.items())
            say(console, f"{number} of {len(combinations)}: {shown}", "bold")
            config, found = combination.config, None
            try:
                found = _run(config, folder, console)
            except Exception as error:  # whatever it is, it belongs to one combination, and is reported
                stops.check()  # or comes of a signal, which is for the whole sweep
                if jax.process_count() > 1:
                    raise  # perhaps in one process alone, and the others cannot go on without it
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                write_text(Path(config.output) / ERROR_FILE, traceback.format_exc())
                say(console, f"failed     {reason}", "red")
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
    (Path(config.output) / ERROR_FILE).unlink(missing_ok=True)  # of an earlier try
    return measurement
