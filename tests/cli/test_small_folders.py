"""A small folder of notes trains by the same command as any other."""

import random
from pathlib import Path

import pytest

from gemma2_jax.checkpoints.store import latest_step
from gemma2_jax.cli.main import main
from gemma2_jax.config import load_config
from gemma2_jax.run import RunConfig

WORDS = """note garden weather model teacher water bread letter sea winter door table river light paper
house""".split()  # noqa: SIM905
SETTINGS = [
    "model=toy",
    "data=files",
    "data.workers=1",
    "data.seq_len=32",
    "data.batch_size=8",
    "training.steps=2",
]
SETTINGS += [
    "optimizer.warmup_steps=1",
    "training.log_every=1",
    "training.eval_every=2",
    "checkpoint.every=2",
]
SETTINGS += ["metrics.tensorboard=false"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes of 6 kB, an empty one among them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.md").write_text(" ".join(draw.choices(WORDS, k=200)))
    (folder / "empty.md").write_text("")
    return folder


@pytest.mark.thorough
def test_a_small_folder_trains_goes_on_and_is_repeated(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *SETTINGS, "data.source=notes/**/*.md"]
    assert main([*command, "name=notes"]) == 0
    message = capsys.readouterr().err
    assert "tokenizer.vocab_size is 4096, but this text supports at most" in message
    saved = load_config(RunConfig, "runs/notes/config.yaml")
    assert saved.tokenizer.vocab_size == saved.model.vocab_size < 500
    assert main([*command, "name=notes"]) == 0
    assert capsys.readouterr().out == "runs/notes was trained to step 2.\n"
    assert main([*command, "name=second", "seed=1"]) == 0
    repeat = ["train", "--config", "runs/notes/config.yaml"]
    assert main([*repeat, "output=runs/repeated"]) == 0
    assert main(repeat) == 0
    assert latest_step("runs/repeated") == 2
    first, repeated = (
        Path(f"runs/{name}/metrics.jsonl").read_text().split('"loss": ')[1:] for name in ("notes", "repeated")
    )
    assert [row.split(",")[0] for row in first] == [row.split(",")[0] for row in repeated]


def test_other_notes_in_the_same_folder_get_another_folder_suggested(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", *SETTINGS, "data.source=notes/*.md"]) == 0
    assert main(["data", "prepare", *SETTINGS, "data.source=notes/1.md"]) == 1
    message = capsys.readouterr().err
    assert (
        "was prepared from data.source ['notes/*.md'], but ['notes/1.md'] contains different text" in message
    )
    assert "set another folder, as in data.folder=runs/data/files_4096-2, or delete this one" in message
    assert (
        main(["data", "prepare", *SETTINGS, "data.source=notes/1.md", "data.folder=runs/data/files_4096-2"])
        == 0
    )


@pytest.mark.parametrize("key", ["data.source=notes/empty.md", "data.source=absent.md", "data.text_fild=x"])
def test_a_refused_command_leaves_no_folder(notes: Path, key: str) -> None:
    assert main(["train", *SETTINGS, "data.source=notes/*.md", key, "output=runs/deep/in/there"]) == 1
    assert [path.name for path in notes.parent.iterdir()] == ["notes"]
