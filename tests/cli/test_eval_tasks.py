"""Mistakes in the options of `gemma2 eval --tasks`; what it computes is in tests/evaluation/test_harness.py."""

import re
import sys
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.evaluation.harness_tasks import Tasks, TaskSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "offline", "--text", "a.txt"], "--text is about text, and --tasks bring their own"),
        (["--tasks", "offline", "--memorisation", "3"], "--memorisation is about text"),
        (["--shots", "0"], "--shots is about tasks; name them with --tasks"),
        (["--apply-chat-template"], "--apply-chat-template is about tasks"),
        (["--samples", "s.jsonl"], "--samples is about tasks"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "runs/none", *options]) == 1
    assert message in capsys.readouterr().err


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.tasks has an empty name"):
        TaskSettings(["arc_easy", ""])
    with pytest.raises(UserError, match=r"evaluation\.shots is -1; it must be at least 0"):
        TaskSettings(["arc_easy"], shots=-1)
    with pytest.raises(
        UserError, match=re.escape(f"evaluation.tasks_folder is {tmp_path}/none, which is not a folder")
    ):
        TaskSettings(["arc_easy"], tasks_folder=f"{tmp_path}/none")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"needs the extra eval .*: pip install 'gemma2_jax\[eval\]'"):
        Tasks(TaskSettings(["offline"]))
