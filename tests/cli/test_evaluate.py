"""The command eval."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.config import build, read_json
from gemma2_jax.evaluation.record import EvaluationRecord
from gemma2_jax.formats.native import write_run
from tests.model.models import vivid

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def run_folder(toy_run, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "run"
    write_run(folder, toy_run.model, vivid(toy_run.model).params(), toy_run.tokenizer.path)
    return folder


@pytest.fixture(scope="module")
def text(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "plain.txt").write_text(texts[3][:300])
    (folder / "records.jsonl").write_text(
        "".join(json.dumps({"body": text[:90]}) + "\n" for text in texts[:2])
    )
    return folder


def test_checkpoints_are_compared_by_domain(run_folder, text, tmp_path, capsys):
    target = tmp_path / "evaluation.json"
    command = ["eval", str(run_folder), "--teacher", str(run_folder), "--context", "24", "--batch", "2"]
    command += ["--text", f"plain={text}/*.txt", f"records={text}/*.jsonl", "data.text_field=body"]
    assert main([*command, "--memorisation", "1", "--json", str(target), "mesh.data=1"]) == 0
    shown, progress = capsys.readouterr()
    assert shown.startswith("document windows of 24 tokens, on 1 x cpu in float32\n")
    words = shown.split()
    assert {"plain", "records", "together", "acceptance", "memorisation:"} <= set(words)
    assert words.count("100.0%") == 2 * 3  # agreement and acceptance with itself
    assert f"gemma2: evaluating {run_folder} on records …" in progress
    record = build(EvaluationRecord, read_json(target), str(target))
    (row,) = record.rows
    scores = row.scores["document"]
    assert set(scores.domains) == {"plain", "records"}
    assert scores.total.tokens == sum(each.tokens for each in scores.domains.values())
    assert scores.domains["plain"].bytes == len((text / "plain.txt").read_bytes())
    assert f"{scores.total.tokens:,}" in words
    assert row.checkpoint == record.teacher
    assert row.memorisation is not None


def test_formats_are_rows_with_their_bytes(run_folder, text, tmp_path, capsys):
    target = tmp_path / "evaluation.json"
    command = ["eval", str(run_folder), "--teacher", str(run_folder), "--context", "24", "--batch", "2"]
    command += [
        "--text",
        f"{text}/*.txt",
        "--quantize",
        "none,int8,int4",
        "--json",
        str(target),
        "mesh.data=1",
    ]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "read a token: all weights, keys and values of 24 tokens" in shown
    record = build(EvaluationRecord, read_json(target), str(target))
    assert [row.checkpoint.quantize for row in record.rows] == [None, "int8", "int4"]
    assert [row.name for row in record.rows][1:] == [f"{run_folder} in int8", f"{run_folder} in int4"]
    kls: list[Any] = [row.scores["document"].total.kl for row in record.rows]
    assert kls[0] == 0
    assert kls[0] < kls[1] < kls[2]
    sizes: list[Any] = [row.weight_bytes for row in record.rows]
    read: list[Any] = [row.bytes_per_token for row in record.rows]
    assert sizes[0] > 3 * sizes[1] > 4.5 * sizes[2]
    assert len({token - size for token, size in zip(read, sizes, strict=True)}) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("window", ["3", "null"])
def test_windows_are_replaced(run_folder, text, tmp_path, capsys, window):
    target = tmp_path / "evaluation.json"
    command = ["eval", str(run_folder), "--context", "24", "--batch", "2", "--json", str(target), "--text"]
    assert main([*command, str(text / "*.txt"), f"model.sliding_window={window}"]) == 0
    named = "with windows of 3" if window == "3" else "without windows"
    assert f"gemma2: evaluating {run_folder} {named} on" in capsys.readouterr().err
    (row,) = build(EvaluationRecord, read_json(target), str(target)).rows
    assert row.checkpoint.sliding_window == json.loads(window)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--quantize", "int8,int5"], "--quantize has 'int5', did you mean"),
        (["--windows", "slding"], "--windows is 'slding', did you mean sliding (accepted:"),
        (
            ["--text", "x", "--stride", "3"],
            "--stride is 3, which only --windows sliding uses; set that, too.",
        ),
        (["--text", "no/*.txt"], "--text 'no/*.txt' matches no file; accepted: python-docs, or globs of"),
        ([], "RUN has no validation data of its own"),
        (["--data", "nowhere"], "data.folder nowhere is not prepared; run `gemma2 data prepare`"),
        (
            ["data.folder=x"],
            "data.folder=x has no effect on an evaluation; accepted: keys of mesh, layout, compute",
        ),
        (
            ["model.d_model=64"],
            "model.d_model=64 has no effect on an evaluation; accepted: keys of mesh, layout, compute",
        ),
        (["model.sliding_window=0"], "the configuration: model.sliding_window is 0; it must be at least 1,"),
        (["mesh.dta=2"], "the configuration: there is no key mesh.dta, did you mean data"),
        (["--limit", "0"], "--limit is 0; accepted: at least 1, below 2**31."),
        (["no/such/run"], "no/such/run"),
    ],
)
def test_mistakes_are_one_sentence(run_folder, options, sentence, capsys):
    assert main(["eval", str(run_folder), *options]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"gemma2: {sentence.replace('RUN', str(run_folder))}")


def test_a_result_that_cannot_be_written_is_refused_before_the_evaluation(run_folder, text, capsys):
    for target, reason in (
        (text / "plain.txt" / "evaluation.json", "which cannot be used:"),
        (text, "which is a folder;"),
    ):
        assert main(["eval", str(run_folder), "--text", str(text / "*.txt"), "--json", str(target)]) == 1
        assert capsys.readouterr().err.startswith(f"gemma2: --json is {target}, {reason}")
