"""A sweep: one run for each combination of values, one after another, compared in one table."""

import dataclasses
import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.sharding.hosts import is_first
from gemma2_jax.studies.stages import Measurement, measure_run, prepare_all, train_run
from gemma2_jax.studies.tables import Table, say
from gemma2_jax.training.config import RunConfig

ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Combination:
    """One combination of a sweep: the values that it sets, and its configuration or why it has none."""

    values: Mapping[str, str]
    config: RunConfig | UserError


def run_sweep(combinations: Sequence[Combination], output: str, console: Console) -> bool:
    """Runs what is missing of a sweep and reports all of it, the lowest validation loss first.

    A combination that fails is reported, its traceback kept as error.txt in its folder, and the rest goes on; but with
    several processes it ends the sweep.

    Args:
        output: the sweep's folder; gets table.md and results.json.

    Returns:
        Whether every combination has a result.
    """
    done: list[tuple[Combination, Measurement]] = []
    failed: list[tuple[Combination, str]] = []
    for number, combination in enumerate(combinations, 1):
        told = " ".join(f"{key}={value}" for key, value in combination.values.items())
        say(console, f"{number} of {len(combinations)}: {told}", "bold")
        try:
            done.append((combination, _run(combination, console)))
        except Exception as error:  # whatever it is, it is one combination's, and is told
            stops.check()  # or comes of a signal, which is the whole sweep's
            if jax.process_count() > 1:
                raise  # perhaps in one process alone, and the others cannot go on without it
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failed.append((combination, reason))
            _keep_traceback(combination)
            say(console, f"failed     {reason}", "red")
    done.sort(key=lambda pair: pair[1].evaluation.loss)
    if is_first():
        _write(done, failed, Path(output), console)
    return not failed


def _run(combination: Combination, console: Console) -> Measurement:
    if isinstance(combination.config, UserError):
        raise combination.config
    prepare_all([combination.config], console)
    train_run(combination.config, console)
    measurement = measure_run(combination.config, console)
    (Path(combination.config.output) / ERROR_FILE).unlink(missing_ok=True)  # of an earlier try
    return measurement


def _keep_traceback(combination: Combination) -> None:
    if isinstance(combination.config, RunConfig):
        write_text(Path(combination.config.output) / ERROR_FILE, traceback.format_exc())


def _write(
    done: Sequence[tuple[Combination, Measurement]],
    failed: Sequence[tuple[Combination, str]],
    folder: Path,
    console: Console,
) -> None:
    keys = list(dict.fromkeys(key for combination, _ in [*done, *failed] for key in combination.values))
    rows = [
        [
            *_cells(combination, keys),
            f"{measurement.evaluation.loss:.4f}",
            f"{measurement.evaluation.perplexity:.2f}",
        ]
        for combination, measurement in done
    ]
    rows += [[*_cells(combination, keys), "failed", "–"] for combination, _ in failed]
    table = Table([*keys, "validation loss", "perplexity"], rows, left=len(keys))
    table.print(
        console, f"{len(done)} of {len(done) + len(failed)} combinations, lowest validation loss first"
    )
    reasons = [f"- {' '.join(_cells(combination, keys))} failed: {reason}" for combination, reason in failed]
    write_text(
        folder / "table.md",
        "\n\n".join([table.markdown(), *(["\n".join(reasons)] if reasons else [])]) + "\n",
    )
    results = [
        {"values": dict(combination.values), **dataclasses.asdict(measurement.evaluation)}
        for combination, measurement in done
    ] + [{"values": dict(combination.values), "error": reason} for combination, reason in failed]
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
    say(console, f"table in {folder / 'table.md'}")


def _cells(combination: Combination, keys: Sequence[str]) -> list[str]:
    return [combination.values.get(key, "") for key in keys]
