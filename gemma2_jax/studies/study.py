"""Studies: runs trained in order, measured on the same text, and reported together."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from gemma2_jax.processes.hosts import is_first
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.report import write_report
from gemma2_jax.studies.stages import (
    cache_teacher,
    check_unchanged,
    exclusive_command,
    measure_run,
    prepare_all,
    timed,
    train_run,
)
from gemma2_jax.studies.tables import print_line


def run_study(study: StudyConfig, runs: Mapping[str, RunConfig], output: str, console: Console) -> None:
    """Runs the unfinished stages of a study and writes its report.

    Args:
        runs: the configuration of each of `study.trained_runs()`, with output folders inside `output`.
        output: the study's folder. Receives report.md, loss.png, results.json and times.json, and with several seeds
            summary.png.

    Raises:
        UserError: a folder in `output` was begun with another configuration.
    """
    folder = Path(output)
    teachers: dict[str, RunConfig | None] = {}
    for folder_name, (name, _) in study.trained_runs().items():
        teacher = study.runs[name].teacher
        teachers[folder_name] = runs[teacher] if teacher else None
    for name, config in runs.items():  # check all runs before the first one trains for hours
        check_unchanged(config, teachers[name])
    with exclusive_command(folder):
        print_line(console, study.title, "bold")
        with timed(folder, "data"):
            prepare_all(list(runs.values()), console)
        for name, config in runs.items():
            if config.distill.cache is not None:
                with timed(folder, f"cache {name}"):
                    cache_teacher(config, console)
            with timed(folder, f"train {name}"):
                train_run(config, console, teachers[name])
        reference = runs[study.reference] if study.reference else None
        measurements = {}
        for name, config in runs.items():
            with timed(folder, f"evaluate {name}"):
                other = reference if name != study.reference else None
                measurements[name] = measure_run(config, console, other, study.prompts, study.sample_tokens)
        if is_first():
            write_report(study, runs, measurements, folder, console)
