"""The command plan."""

import json
import re
from dataclasses import replace

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.planning import topologies

TOY = ["plan", "model=toy", "tokenizer.vocab_size=512", "data.batch_size=8", "data.seq_len=32", "mesh.data=8"]


def test_a_table_and_its_figures_as_json(capsys):
    assert main([*TOY, "topology=cpu:8"]) == 0
    table = capsys.readouterr().out
    assert "run on cpu:8 fits." in table
    for words in (
        "memory per device",
        "compiled in",
        "model FLOPs per step",
        "least time of a step",
        "(estimate)",
    ):
        assert words in table
    assert main([*TOY, "topology=cpu:8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["devices"]) == (True, 8)
    assert found["program_per_device"]["flops"] > 0


def test_what_does_not_fit_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(topologies, "_CPU", replace(topologies._CPU, memory=1000))
    assert main([*TOY, "topology=cpu:8", "training.accumulation=1"]) == 3
    output = capsys.readouterr().out
    assert "does not fit" in output
    assert "What would help:" in output


def test_placement_needs_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr("gemma2_jax.planning.program.compile_step", None)
    monkeypatch.setenv("COLUMNS", "120")
    asked = [
        *TOY[:-1],
        "model.num_kv_heads=2",
        "topology=cpu:8",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "--placement",
    ]
    assert main(asked) == 0
    output = capsys.readouterr().out
    assert "run on cpu:8, mesh data=2 x fsdp=2 x tensor=2" in output
    assert re.search(r"embedder/embedding +V512 D\d+ +V: tensor \(2\), D: fsdp \(2\)", output)
    assert "B along data (2) x fsdp (2); N, K, F, V along tensor (2)." in output
    assert "V along tensor (2) x fsdp (2)" in output
    assert main([*asked, "--json"]) == 0
    (student,) = json.loads(capsys.readouterr().out)["models"]
    assert student["weights"][0]["axes"] == {"V": ["tensor"], "D": ["fsdp"]}


def test_a_search_prints_what_to_type(capsys):
    assert main([*TOY, "topology=cpu:8", "--search", "--budget", "0"]) == 0
    output = capsys.readouterr().out
    assert "Candidates tried on cpu:8: 1" in output
    assert "Best: mesh.replica=1 mesh.data=" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TOY, "topology is missing"),
        ([*TOY, "topology=abacus:8"], "topology=abacus:8 names the unknown chip abacus"),
        ([*TOY[:-1], "topology=cpu:8", "mesh.data=3"], "needs exactly 3 devices, but there are 8 devices"),
        (
            [*TOY[:-1], "topology=cpu:8", "mesh.data=1", "mesh.tensor=8"],
            "along mesh.tensor, which is 8 and does not divide it",
        ),
        ([*TOY, "topology=cpu:8", "data.batch_size=12"], "choose a multiple of 8"),
        ([*TOY, "topology=cpu:8", "model=toi"], "there is no model toi"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gemma2: ")
    assert len([line for line in error.splitlines() if not line.endswith("…")]) == 1
