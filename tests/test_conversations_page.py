"""Every command of the page on conversations, run in the page's order at toy size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.cli.compose import compose
from gemma2_jax.cli.main import main
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.test_docs import ROOT, commands

pytestmark = pytest.mark.usefixtures("one_device")

TOY = {
    "model=small_6m": "model=toy",
    "model=gemma2_2b": "model=toy",
    "distill.dtype=bfloat16": "distill.dtype=float32",
}
DATA = [
    "data.seq_len=64",
    "data.batch_size=2",
    "data.workers=1",
    "tokenizer.vocab_size=400",
    "training.accumulation=1",
]
TRAINING = [
    "compute=float32",
    "mesh=cpu_1",
    "training.steps=2",
    "training.eval_every=2",
    "training.log_every=2",
    "checkpoint.every=2",
]
MORE = {
    "train": [*DATA, *TRAINING],
    "data": DATA,
    "generate": ["--max-new-tokens", "4"],
    "convert": [],
}


@pytest.fixture
def folder(toy_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with conversations, notes, and small models in place of the released ones."""
    (tmp_path / "chats").mkdir()
    chats = [{"prompt": f"Who is {name}?", "completion": f"This is {name}."} for name in "abcdefghijklmnop"]
    (tmp_path / "chats" / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("A note on the model and its teacher.\n\n" * 40)
    model: Gemma2 = vivid(compose(["model=toy", "tokenizer.vocab_size=400"]).model)
    first = write_teacher(replace(toy_run, model=model.config), model, tmp_path / "weights" / "2b")
    for other in ("weights/2b-it", "weights/9b", "weights/9b-it", "runs/quickstart/teacher"):
        shutil.copytree(first, tmp_path / other)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.thorough
def test_the_commands_run_one_after_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    ran = []
    for command in commands(ROOT / "docs" / "conversations.md"):
        if command.words[0] != "gemma2" or "google/gemma-2-2b" in command.words:
            continue  # needs Ollama, or downloads the model that stands in the folder
        verb = command.words[1]
        words = [TOY.get(word, word) for word in command.words[1:]]
        if any(word.startswith("experiment=") for word in words):
            words.append("model=toy")
        assert main([*words, *MORE[verb]]) == 0, (str(command), capsys.readouterr().err)
        ran.append(verb)
    assert ran.count("train") == 6
    printed = capsys.readouterr().out
    assert "« »" in printed
    for name in ("chats", "sft_2b", "qlora_9b", "tuned", "mixed", "distilled_2b"):
        assert (folder / "runs" / name / "metrics.jsonl").is_file()
    assert (folder / "exported" / "chats" / "model.safetensors").is_file()
    assert (folder / "chats.gguf").is_file()
