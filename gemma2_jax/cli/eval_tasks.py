"""The part of `gemma2 eval` that runs tasks of the language-model evaluation harness."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma2_jax.evaluation.config import EvaluationConfig
    from gemma2_jax.evaluation.harness import Sample, TaskRecord

# Options that are about text, which tasks bring themselves, and their defaults.
_OF_TEXT: dict[str, Any] = {
    "text": [],
    "data": None,
    "windows": None,
    "stride": None,
    "teacher": None,
    "memorisation": 0,
}
# Options that are about tasks.
_OF_TASKS = ("shots", "apply_chat_template", "tasks_folder", "run_code", "samples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("benchmarks (extra `eval`)").add_argument
    add(
        "--tasks",
        metavar="NAME,…",
        help="run tasks of the evaluation harness in place of scoring text; offline, report and safety are suites",
    )
    add("--shots", type=int, metavar="N", help="examples in each prompt (as the suite or the task sets)")
    add(
        "--apply-chat-template",
        action="store_true",
        help="put prompts into Gemma 2's chat format, for instruction-tuned models",
    )
    add("--tasks-folder", metavar="DIR", help="a folder with further tasks, in the harness's YAML format")
    add("--run-code", action="store_true", help="allow tasks to run programs that the model generates")
    add(
        "--samples", metavar="FILE", help="write each document's prompts, answers and scores to FILE as JSONL"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    from gemma2_jax.config import UserError, check_place

    if arguments.tasks is None:
        for name in _OF_TASKS:
            given = getattr(arguments, name)
            if given is not None and given is not False:
                raise UserError(f"{_option(name)} is about tasks; name them with --tasks, or leave it out.")
        return
    for name, default in _OF_TEXT.items():
        if getattr(arguments, name) != default:
            raise UserError(
                f"{_option(name)} is about text, and --tasks bring their own; run `gemma2 eval` once for each."
            )
    if arguments.samples is not None:
        check_place("--samples", arguments.samples, is_file=True)
        if Path(arguments.samples).is_dir():
            raise UserError(f"--samples is {arguments.samples}, which is a folder; give the name of a file.")


def run_tasks(
    arguments: argparse.Namespace, checkpoints: Sequence[str], config: "EvaluationConfig", show: bool
) -> int:
    """Runs the tasks, prints and writes the results; returns 1 if a task was left out."""
    from gemma2_jax.evaluation.harness import evaluate_tasks
    from gemma2_jax.evaluation.harness_tasks import TaskSettings

    settings = TaskSettings(
        tasks=tuple(name.strip() for name in arguments.tasks.split(",")),
        shots=arguments.shots,
        chat=arguments.apply_chat_template,
        tasks_folder=arguments.tasks_folder,
        run_code=arguments.run_code,
    )
    record, samples = evaluate_tasks(checkpoints, settings, config, show)
    _print(record)
    if arguments.json is not None:
        record.save(arguments.json)
    if arguments.samples is not None:
        _save(samples, arguments.samples)
    return 1 if any(row.left_out for row in record.rows) else 0


def _print(record: "TaskRecord") -> None:
    from rich.console import Console

    from gemma2_jax.studies.tables import Table, print_line
    from gemma2_jax.training.metrics import format_number

    console = Console()
    several = len(record.rows) > 1

    def rows() -> Iterator[Sequence[str]]:
        for row in record.rows:
            for task, scores in row.tasks.items():
                shots = "–" if scores.shots is None else str(scores.shots)
                documents = "–" if scores.documents is None else f"{scores.documents:,}"
                for name, metric in scores.metrics.items():
                    numbers = [format_number(number, 4) for number in (metric.value, metric.stderr)]
                    named = [row.name, task] if several else [task]
                    yield [*named, shots, documents, name, *numbers]

    left = ["checkpoint", "task"] if several else ["task"]
    columns = [*left, "shots", "documents", "metric", "value", "standard error"]
    chat = ", chat format" if record.chat else ""
    table = Table(columns, list(rows()), left=len(left))
    table.print(console, f"harness {record.versions['lm_eval']}{chat}, on {record.devices} in {record.dtype}")
    reasons = {reason for row in record.rows for reason in row.left_out.values()}
    for reason in sorted(reasons):
        print_line(console, f"left out: {reason}")


def _save(samples: Sequence["Sample"], path: str) -> None:
    from gemma2_jax.files import write_text

    write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
