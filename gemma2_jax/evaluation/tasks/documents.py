"""The documents of the tasks in this folder. The harness loads this file by its path."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def functions(**_: Any) -> dict[str, Dataset]:
    return {"test": _read("pydoc_functions")}


def passages(**_: Any) -> dict[str, Dataset]:
    return {"test": _read("pydoc_passages")}


def modules(**_: Any) -> dict[str, Dataset]:
    return {"test": _read("pydoc_modules"), "examples": _read("pydoc_modules_examples")}


def _read(name: str) -> Dataset:
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    return Dataset.from_list([json.loads(line) for line in text.splitlines()])
