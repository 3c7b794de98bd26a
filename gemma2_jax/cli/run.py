"""`gemma2 run`: runs a study, from its text to its report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.run import RunConfig
    from gemma2_jax.studies.config import StudyConfig

DESCRIPTION = """\
Runs a study: prepares the data, trains its runs in order, evaluates all of them on the same text, and writes a
report with one table, a sample of each run and the loss curves. Finished stages are skipped, so the same command
resumes an interrupted study.

  gemma2 run quickstart                                     into runs/quickstart
  gemma2 run quickstart seed=1 data.seed=1 output=runs/quickstart-1    other weights and data order
  gemma2 run quickstart distilled.training.steps=1000       a key of one run only
  gemma2 config list study                                  list the studies

The study itself sets the name and the folder of each run, and distill.teacher where study.yaml names a teacher.
A study is a folder in experiments/ with a study.yaml; its README has the question and the results.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "run", run, "run a study, such as quickstart", DESCRIPTION, KEYS, resumes=True)
    parser.add_argument("study", metavar="STUDY", help="the study's name, such as quickstart")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from gemma2_jax.cli.roots import find_study
    from gemma2_jax.config import check_place, load_config
    from gemma2_jax.processes.hosts import is_first, join
    from gemma2_jax.studies.config import StudyConfig
    from gemma2_jax.studies.study import run_study
    from gemma2_jax.training.packages import check_packages
    from gemma2_jax.training.prerequisites import check_places, check_sources

    study = load_config(StudyConfig, find_study(arguments.study, arguments.config_dir))
    runs, output = compose_study(arguments.study, study, arguments.overrides, arguments.config_dir)
    check_place("output", output)
    for config in runs.values():
        check_packages(config)
        check_places(config)
    join(next(iter(runs.values())).hosts)
    for name, (run_name, _) in study.trained_runs().items():
        study_run = study.runs[run_name]
        # The study itself creates these, so they need not exist yet.
        created = {"distill.teacher": study_run.teacher is not None, "distill.cache": study_run.cache}
        check_sources([runs[name]], [key for key, is_created in created.items() if is_created])
    run_study(study, runs, output, Console(quiet=not is_first()))


def compose_study(
    name: str, study: "StudyConfig", overrides: Sequence[str], config_dir: str | None
) -> tuple[dict[str, "RunConfig"], str]:
    """Returns the configuration of each run of a study, and the study's folder.

    `key=value` applies to every run, `RUN.key=value` to that run, and `output=` to the study.

    Raises:
        UserError: `compose` refuses an override, or an override sets a key that the study sets itself.
    """
    from gemma2_jax.cli.compose import compose, pairs
    from gemma2_jax.config import UserError

    output = f"runs/{name}"
    shared: list[str] = []
    own: dict[str, list[str]] = {run: [] for run in study.runs}
    for (key, value), text in zip(pairs(overrides), overrides, strict=True):
        first, _, rest = key.partition(".")
        if key == "output":
            output = str(value)
        elif first not in own:
            _refuse_study_keys(text, key, value, study, list(study.runs))
            shared.append(text)
        elif rest:
            _refuse_study_keys(text, rest, value, study, [first])
            own[first].append(text[len(first) + 1 :])
        else:
            raise UserError(f"{text} names a run of the study; accepted: {first}.KEY=VALUE.")
    runs = {}
    for folder, (run_name, seed) in study.trained_runs().items():
        run = study.runs[run_name]
        values: dict[str, Any] = {"name": folder, "output": str(Path(output) / folder)}
        if run.teacher is not None:
            values["distill.teacher"] = str(Path(output) / run.teacher)
        if run.cache:
            values["distill.cache"] = str(Path(output) / "caches" / folder)
        if seed is not None:
            values |= {"seed": seed, "data.seed": seed}
        group = f"metrics.group={output}"  # a given one comes later and takes precedence
        given = [f"experiment={run.experiment}", group, *run.overrides, *shared, *own[run_name]]
        runs[folder] = compose(given, config_dir, values)
    return runs, output


def _refuse_study_keys(text: str, key: str, value: Any, study: "StudyConfig", runs: Sequence[str]) -> None:
    """Raises UserError if the override `text` sets a `key` of `runs` that the study sets itself."""
    from gemma2_jax.config import UserError

    if key == "name":
        raise UserError(f"{text} has no effect, since study.yaml names the runs; leave it out.")
    if study.seeds and (
        key in ("seed", "data.seed") or (key == "data" and isinstance(value, dict) and "seed" in value)
    ):
        raise UserError(f"{text} has no effect, since study.yaml lists the seeds of the runs; leave it out.")
    if key == "output":
        raise UserError(
            f"{text} has no effect, since the study puts each run into a folder of its name; "
            "set the study's folder with output=FOLDER."
        )
    cached = [name for name in runs if study.runs[name].cache]
    if cached and (
        key == "distill.cache" or (key == "distill" and isinstance(value, dict) and "cache" in value)
    ):
        raise UserError(
            f"{text} has no effect, since the study chooses the cache folder of {cached[0]}; leave it out."
        )
    distilled = [name for name in runs if study.runs[name].teacher is not None]
    if distilled and (
        key == "distill.teacher" or (key == "distill" and isinstance(value, dict) and "teacher" in value)
    ):
        raise UserError(
            f"{text} has no effect, since study.yaml makes {study.runs[distilled[0]].teacher} the teacher of "
            f"{distilled[0]}; leave it out, or use `gemma2 train` to train with another teacher."
        )
