"""Suites, and the tasks that come with the project."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma2_jax.evaluation import suites
from gemma2_jax.evaluation.suites import SUITES, SuiteTask, expand_suites

SHIPPED = Path(suites.__file__).with_name("tasks")


def test_suites_are_expanded_and_each_task_runs_once() -> None:
    found = expand_suites(["arc_easy", "safety", "report", "bbq"])
    names = [task.name for task in found]
    assert names[:3] == ["arc_easy", "crows_pairs_english", "bbq"]
    assert len(set(names)) == len(names) == 1 + len(SUITES["safety"]) + len(SUITES["report"]) - 1
    assert SuiteTask("arc_challenge", 25) in found


def documents(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines()]


def test_the_suite_offline_is_what_is_shipped() -> None:
    names = {path.stem for path in SHIPPED.glob("*.yaml")}
    assert {task.name for task in SUITES["offline"]} == names
    kinds = set()
    for name in names:
        text = (SHIPPED / f"{name}.yaml").read_text().replace("!function", "")
        config = yaml.safe_load(text)
        assert config["task"] == name
        kinds.add(config["output_type"])
        assert len(documents(name)) >= 24
    assert kinds == {"multiple_choice", "loglikelihood_rolling", "generate_until"}


def test_documents_have_one_right_answer() -> None:
    for document in documents("pydoc_functions"):
        assert len(set(document["choices"])) == 4
        assert document["answer"] in range(4)
    answers = [document["answer"] for document in documents("pydoc_functions")]
    assert max(map(answers.count, range(4))) == min(map(answers.count, range(4)))
    examples = [document["module"] for document in documents("pydoc_modules_examples")]
    asked = [document["module"] for document in documents("pydoc_modules")]
    assert len(set(asked + examples)) == len(asked + examples)


@pytest.mark.thorough
def test_the_harness_has_the_tasks_of_every_suite() -> None:
    harness = pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install -e '.[eval]'")
    wanted = {task.name for name in ("report", "safety") for task in SUITES[name]}
    found = set()
    for path in Path(harness.__file__).with_name("tasks").rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in ("task", "group"):
                found.add(value.strip().strip("\"'"))
    assert wanted <= found
