"""The output of a run: a live line in a terminal of any width, plain lines in a log, and only from process 0."""

import re
from dataclasses import replace

import jax
import pytest

from gemma2_jax.model.counts import count_parameters
from gemma2_jax.training.loop import train
from gemma2_jax.training.progress import TrainingProgress, duration

ROW = {
    "loss": 4.5,
    "cross_entropy": 5.0,
    "kl": 4.25,
    "match_hidden": 0.25,
    "gradient_norm": 1.0,
    "tokens_per_second": 1234.5,
}
VALIDATION = {"cross_entropy": 4.0, "perplexity": 54.6, "kl": 0.5, "agreement": 0.6, "acceptance": 0.7}


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `progress` sees, which tests set."""
    now = [100.0]
    monkeypatch.setattr("gemma2_jax.training.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_has_plain_lines_with_all_terms_and_the_time_left(clock, capsys):
    with TrainingProgress("run", 40, show=True) as progress:
        with progress.doing("run: compiling the training step"):
            clock[0] += 65
        for step in range(1, 11):
            clock[0] += 2
            progress.advance(step)
        progress.report("run", 10, "train", ROW)
        with progress.doing("validating", brief=True):
            clock[0] += 20
        progress.report("run", 10, "validation", VALIDATION)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "run: compiling the training step …",
        "run: compiling the training step: done in 1 min 05 s",
        "run  step 10/40  loss 4.5000  kl 4.2500  cross_entropy 5.0000  match_hidden 0.2500  1,234 tokens/s  "
        "1 min 00 s left",
        "run  step 10/40  validation cross-entropy 4.0000  perplexity 54.60  kl 0.5000  "
        "agreement with the teacher 60.0%  acceptance 70.0%  2 min 00 s left",
    ]
    assert "\x1b" not in captured.err


def test_a_run_that_is_only_evaluated_again_has_no_time_left(clock, capsys):
    with TrainingProgress("run", 40, show=True) as progress:
        progress.report("run", 40, "validation", VALIDATION)
    assert capsys.readouterr().err.endswith("  0 s left\n")


def test_a_loss_of_one_term_is_printed_once(clock, capsys):
    with TrainingProgress("run", 2, show=True) as progress:
        progress.advance(1)
        progress.report("run", 1, "train", {"loss": 4.5, "cross_entropy": 4.5, "tokens_per_second": 10.0})
    assert capsys.readouterr().err == "run  step 1/2  loss 4.5000  10 tokens/s  0 s left\n"


def test_other_processes_show_nothing(capsys):
    with TrainingProgress("run", 2, show=False) as progress, progress.doing("compiling"):
        progress.advance(1)
        progress.report("run", 1, "train", ROW)
        progress.print_line("a line")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def halfway(clock):
    progress = TrainingProgress("run", 40, show=False)
    for step in range(1, 21):
        clock[0] += 1
        progress.advance(step)
    progress.report("run", 20, "train", ROW)
    return progress


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("plain", [False, True])
def test_the_live_line_fits_into_any_terminal(halfway, width, plain):
    line = halfway._line(width, plain)
    assert line.cell_len <= width
    assert line.plain.startswith("run  20/40  ")
    assert line.plain.endswith("20 s left")
    assert ("loss 4.5000" in line.plain) == (width >= 40)
    assert ("kl 4.2500" in line.plain) == (width >= 60)
    assert line.plain.isascii() or not plain


def test_the_live_line_has_a_bar_where_there_is_room(halfway):
    assert "####################...................." in halfway._line(200, plain=True).plain


def test_the_live_line_shows_the_current_work_and_its_duration(clock, halfway):
    with halfway.doing("validating"):
        clock[0] += 75
        assert "validating 1 min 15 s" in halfway._line(80, plain=True).plain
    assert "validating" not in halfway._line(80, plain=True).plain


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3725, "1 h 02 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.thorough
def test_a_run_prints_its_parts_and_its_work_before_the_first_step(toy_run, tmp_path, capsys, monkeypatch):
    first_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first_device)
    output = str(tmp_path / "run")
    train(replace(toy_run, output=output, training=replace(toy_run.training, steps=2, eval_every=2)))
    lines = capsys.readouterr().err.splitlines()
    parameters = count_parameters(toy_run.model).total
    assert lines[0] == f"toy: {parameters:,} parameters, 2 steps of 4 x 32 tokens, in {output}"
    assert re.fullmatch(r"data: [\d,]+ tokens to train on, [\d,]+ held out, in .*", lines[1])
    assert lines[2] == "devices: 1 x cpu"
    compiling = lines.index("toy: compiling the training step …")
    first = next(number for number, line in enumerate(lines) if line.startswith("toy  step 1/2  loss "))
    assert 2 < compiling < first
    assert all(line.endswith(" left") for line in lines[first:])
    assert "validation cross-entropy" in lines[-1]
