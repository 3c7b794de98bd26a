"""Named lists of the harness's tasks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SuiteTask:
    """A task of the harness, and its number of examples in the prompt; None for the number that the task sets."""

    name: str
    shots: int | None = None


SUITES: dict[str, Sequence[SuiteTask]] = {
    # Shipped with the project, so they need no network.
    "offline": (
        SuiteTask("pydoc_functions"),
        SuiteTask("pydoc_passages"),
        SuiteTask("pydoc_modules"),
    ),
    # The pre-trained models' benchmarks in the Gemma 2 report (arXiv 2408.00118), with its numbers of shots. Prompts
    # and scoring are the harness's, so scores are not exactly comparable with the report's.
    "report": (
        SuiteTask("mmlu", 5),
        SuiteTask("arc_challenge", 25),
        SuiteTask("gsm8k", 5),
        SuiteTask("agieval_en", 3),  # 3 to 5 in the report
        SuiteTask("drop", 3),
        SuiteTask("bbh_cot_fewshot"),  # its prompts hold three examples, with their chains of thought
        SuiteTask("winogrande", 5),
        SuiteTask("hellaswag", 10),
        SuiteTask("hendrycks_math", 4),
        SuiteTask("arc_easy", 0),
        SuiteTask("piqa", 0),
        SuiteTask("social_iqa", 0),
        SuiteTask("boolq", 0),
        SuiteTask("triviaqa", 5),
        SuiteTask("nq_open", 5),
        SuiteTask("humaneval", 0),
        SuiteTask("mbpp", 3),
    ),
    # Of the report's safety set, those that the harness has and that need no service: RealToxicityPrompts is scored by
    # a service, and the harness has no Winobias.
    "safety": (
        SuiteTask("crows_pairs_english"),
        SuiteTask("bbq"),
        SuiteTask("winogender_all"),
        SuiteTask("truthfulqa_mc2"),
        SuiteTask("toxigen"),
    ),
}


def expand_suites(names: Sequence[str]) -> list[SuiteTask]:
    """Returns the tasks of a list of names, each once: a suite stands for its tasks, any other name for itself."""
    found: dict[str, SuiteTask] = {}
    for name in names:
        for task in SUITES.get(name, (SuiteTask(name),)):
            found.setdefault(task.name, task)
    return list(found.values())
