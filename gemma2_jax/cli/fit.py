"""`gemma2 fit`: fits a scaling law to finished runs."""

import argparse
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import Verbs, add_verb

if TYPE_CHECKING:
    from gemma2_jax.studies.scaling.fit_report import Question

DESCRIPTION = """\
Fits a scaling law to the final validation losses of finished runs: the loss as a function of N parameters and D tokens.
PATH is a run folder, or a folder that contains runs: a sweep, a study.

  gemma2 fit runs/scaling                                           parameters of the laws, with intervals
  gemma2 fit runs/scaling --predict N=5e6,D=1e8 --compute 1e15      predictions, and the best N and D for some FLOPs
  gemma2 fit runs/a runs/b runs/c runs/d runs/e runs/f --output fits/mine

Runs on text alone get L(N, D) = E + A / N^alpha + B / D^beta (Chinchilla, arXiv 2203.15556), which needs at least 6
runs. Runs with a teacher get the distillation law (arXiv 2502.08606), which adds the teacher's loss and needs at least
10 runs from at least 2 teachers, beside the runs on text. With --law chinchilla, the first law is fitted to the runs of
each teacher instead. If there are both kinds of runs, the output also shows between which FLOPs a teacher pays off.

All runs need the same data and tokenizer. Runs that are unfinished, or that started from a checkpoint, are left out.
The fit minimises the Huber loss (delta 0.001) of log L; intervals are those of fits to resampled runs. fit.json and
fit.png are written to PATH, or to the folder given by --output.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "fit", run, "fit a scaling law to finished runs", DESCRIPTION)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a run folder, a sweep, or a study")
    add(
        "--predict",
        action="append",
        default=[],
        metavar="N=…,D=…",
        help="predict the loss of N parameters after D tokens; T=… adds a teacher of that loss; may be repeated",
    )
    add(
        "--compute",
        action="append",
        default=[],
        metavar="FLOPS",
        help="find the best N and D for a number of FLOPs (6 N D, and 2 per teacher's parameter and token); may be "
        "repeated",
    )
    add(
        "--law",
        metavar="NAME",
        default="distillation",
        help="for runs with a teacher: distillation or chinchilla",
    )
    add(
        "--non-embedding",
        action="store_true",
        help="count parameters without the embedding (by default, the tied embedding counts once)",
    )
    add(
        "--teacher-loss",
        metavar="LOSS",
        help="validation cross-entropy of a teacher that is not a run folder",
    )
    add("--bootstrap", metavar="COUNT", default="200", help="number of resampled fits (200); 0: no intervals")
    add("--seed", metavar="SEED", default="0", help="seed of the resampling (0)")
    add("--output", metavar="DIR", help="folder for fit.json and fit.png; needed if several PATHs are given")


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from rich.console import Console

    from gemma2_jax.config import UserError, check_place, suggest
    from gemma2_jax.screen import activity

    law = arguments.law
    if law not in ("chinchilla", "distillation"):
        raise UserError(f"--law is {law}, {suggest(law, ('chinchilla', 'distillation'))}.")
    questions = [_question(text) for text in arguments.predict]
    budgets = [_positive("--compute", text) for text in arguments.compute]
    resamples = _whole("--bootstrap", arguments.bootstrap)
    seed = _whole("--seed", arguments.seed)
    teacher_loss = None
    if arguments.teacher_loss is not None:
        teacher_loss = _positive("--teacher-loss", arguments.teacher_loss)
    output = arguments.output
    if output is None:
        if len(arguments.paths) > 1:
            raise UserError(
                "several PATHs are given, so the folder for the fit is not clear; add --output DIR."
            )
        output = arguments.paths[0]
    check_place("--output", output)

    from gemma2_jax.studies.scaling.fit_report import write_fit
    from gemma2_jax.studies.scaling.fitted import fit_runs
    from gemma2_jax.studies.scaling.runs import collect_runs

    embedding = not arguments.non_embedding
    collected = collect_runs(arguments.paths, embedding, teacher_loss)
    with activity("fitting"):
        fit = fit_runs(collected.runs, law, resamples, seed)
    write_fit(fit, collected, embedding, questions, budgets, Path(output), Console())


def _question(text: str) -> "Question":
    from gemma2_jax.config import UserError
    from gemma2_jax.studies.scaling.fit_report import Question

    values: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in ("N", "D", "T") or key in values:
            raise UserError(
                f"--predict is {text}; accepted: N=…,D=… or N=…,D=…,T=…, as in --predict N=5e6,D=1e8."
            )
        values[key] = _positive(f"{key} of --predict {text}", value)
    if not {"N", "D"} <= values.keys():
        raise UserError(f"--predict is {text}; it needs both N and D, as in --predict N=5e6,D=1e8.")
    return Question(values["N"], values["D"], values.get("T"))


def _positive(what: str, text: str) -> float:
    import math

    from gemma2_jax.config import UserError

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} is {text}; accepted: a number above 0, as in 2.5e6.")
    return value


def _whole(what: str, text: str) -> int:
    from gemma2_jax.config import UserError

    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{what} is {text}; accepted: a whole number, 0 or more, of at most 18 digits.")
    return int(text)
