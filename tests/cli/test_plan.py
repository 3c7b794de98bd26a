"""The command plan."""

import json
import re
from dataclasses import replace

import pytest

from gemma2_jax.cli.compose import compose
from gemma2_jax.cli.main import main
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.model.decoder import CHUNK
from gemma2_jax.planning import topologies
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.parameters import mostly_thorough

TOY = ["plan", "model=toy", "tokenizer.vocab_size=512", "data.batch_size=8", "data.seq_len=32", "mesh.data=8"]


def test_a_table_and_its_figures_as_json(capsys):
    assert main([*TOY, "topology=cpu:8"]) == 0
    table = capsys.readouterr().out
    assert "run on cpu:8 fits." in table
    for words in (
        "memory per device",
        "compiled in",
        "model FLOPs per step",
        "minimum time of a step",
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


def test_generation_is_planned_in_a_format(capsys):
    asked = ["plan", "--decode", "model=toy", "tokenizer.vocab_size=512", "topology=cpu:1", "mesh.data=1"]
    asked += ["--batch", "2", "--context", "32", "--quantize", "int4", "--quantize-cache", "int8"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = compose(["model=toy", "tokenizer.vocab_size=512"]).model
    slots = 2 * (8 + 32)  # of both rows, in a local and a global layer
    one_slot = (
        2 * model.num_kv_heads * (model.head_dim + 4) + 4
    )  # keys and values with their scales, and a position
    assert (found["cache_in"], found["cache"]) == ("int8", slots * one_slot)
    assert (found["fits"], found["weights_in"], found["batch"], found["context"]) == (True, "int4", 2, 32)
    assert 4 * count_parameters(model).total > 6 * found["weights"]
    assert found["prefill"]["tokens"] == 64
    assert found["decode"]["tokens"] == 2
    assert found["prefill"]["flops"] > 8 * found["decode"]["flops"] > 0
    assert found["decode"]["memory_per_device"]["argument_bytes"] >= found["weights"] + found["cache"]
    assert found["weights"] < found["ideal"] <= found["weights"] + found["cache"]


@mostly_thorough("mesh", [["mesh.data=1"], ["mesh.data=2", "mesh.tensor=2"]])
def test_a_plan_counts_every_chunk_of_a_prompt(mesh, capsys):
    """Of twice as many chunks, the products with weights are twice as large, and those of attention larger still."""
    devices = 2 ** len([each for each in mesh if each.endswith("2")])
    keys = ["model=toy", "tokenizer.vocab_size=512", "model.num_kv_heads=2", f"topology=cpu:{devices}", *mesh]

    def prefill(context: int) -> dict[str, float]:
        assert main(["plan", "--decode", *keys, "--batch", "2", "--context", str(context), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["prefill"]

    half, whole = prefill(2 * CHUNK), prefill(4 * CHUNK)
    assert whole["flops"] > 2 * half["flops"]
    assert whole["loops_without_trip_count"] == 0


def test_a_plan_of_generation_is_printed(capsys):
    asked = ["plan", "--decode", "model=toy", "tokenizer.vocab_size=512", "topology=cpu:1", "mesh.data=1"]
    assert main([*asked, "--context", "32"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "run in float32 on cpu:1, 1 x 32 positions, fits." in shown
    assert "A token reads at least" in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch", "2"], "--batch belongs to --decode"),
        (["--quantize-cache", "int8"], "--quantize-cache belongs to --decode"),
        (["--decode", "--context", "0"], "--context is 0; both must be at least 1"),
        (["--decode", "--context", f"{10**20}"], "their product must be at most 1073741824"),
        (["--decode", "--batch", "3", "mesh.data=8"], "--batch is 3 rows, which"),
    ],
)
def test_options_of_generation_are_checked(options, sentence, capsys):
    topology = "topology=cpu:8" if "mesh.data=8" in options else "topology=cpu:1"
    assert main(["plan", "model=toy", topology, *options]) == 1
    assert sentence in capsys.readouterr().err


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


@pytest.mark.thorough
def test_a_search_prints_what_to_type(capsys):
    assert main([*TOY, "topology=cpu:8", "--search", "--budget", "0"]) == 0
    output = capsys.readouterr().out
    assert "Candidates tried on cpu:8: 1" in output
    assert "Best: mesh.replica=1 mesh.data=" in output


STUDENTS = [*TOY, "topology=cpu:8", "--student", "one", "--student", "two", "seed=1"]


def test_students_without_a_teacher_have_a_plan_each(capsys):
    """Without a teacher, each student has its own program."""
    assert main([*STUDENTS, "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["programs"]
    assert (one["name"], two["name"]) == ("one", "two")


@pytest.mark.thorough
def test_students_share_a_program(capsys, toy_run, tmp_path):
    teacher = write_teacher(toy_run, vivid(replace(toy_run.model, vocab_size=512)), tmp_path / "teacher")
    asked = [*TOY, "topology=cpu:8", "objective=distillation", "distill=online", f"distill.teacher={teacher}"]
    asked += ["--student", "one", "--student", "two", "model.num_layers=6"]
    assert main(asked) == 0
    output = capsys.readouterr().out
    assert "one + two on cpu:8 fits." in output
    assert re.search(r"parameters +[\d.]+ \wiB +\n +one +[\d.]+ \wiB \([\d,]+ parameters\) *\n +two ", output)
    assert main([*asked, "--json"]) == 0
    (program,) = json.loads(capsys.readouterr().out)["programs"]
    assert list(program["parameters"]) == ["one", "two"]
    assert main([*asked, "--placement", "--json"]) == 0
    (placed,) = json.loads(capsys.readouterr().out)["programs"]
    assert [model["role"] for model in placed["models"]] == ["student one", "student two", "teacher"]


@pytest.mark.parametrize(
    "students",
    [[], pytest.param(["--student", "one", "--student", "two", "seed=1"], marks=pytest.mark.thorough)],
)
@pytest.mark.parametrize(
    "action", [pytest.param([], marks=pytest.mark.thorough), ["--search", "--budget", "0"], ["--placement"]]
)
def test_every_plan_has_the_vocabulary_of_prepared_data(students, action, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("".join(f"note {number} of few words\n" for number in range(400)))
    run = [
        "model=toy",
        f"data.source={tmp_path}/notes.txt",
        f"data.folder={tmp_path}/data",
        f"tokenizer.path={tmp_path}/data/tokenizer.model",
    ]
    assert main(["data", "prepare", *run]) == 0
    (tokens,) = map(int, re.findall(r"lowered to (\d+)", capsys.readouterr().err))
    sizes = ["data.batch_size=8", "data.seq_len=32", "mesh.data=8", "topology=cpu:8"]
    assert main(["plan", *run, *sizes, "--json", *action, *students]) == 0
    found = json.loads(capsys.readouterr().out)
    (first, *others) = found["programs"] if students else [found]
    assert len(others) == bool(students)
    D = compose(["model=toy"]).model.d_model
    for plan in (first, *others):
        if action == ["--placement"]:
            assert plan["models"][0]["weights"][0]["sizes"] == {"V": tokens, "D": D}
        else:
            (tried,) = plan["tried"] if action else [plan]
            config = replace(compose(["model=toy"]).model, vocab_size=tokens)
            assert set(tried["parameters"].values()) == {count_parameters(config).total}


@pytest.mark.parametrize("budget", ["-5", "nan"])
def test_a_budget_that_is_no_time_is_refused(budget, capsys):
    assert main([*TOY, "topology=cpu:8", "--search", "--budget", budget]) == 1
    assert (
        capsys.readouterr().err
        == f"gemma2: --budget is {budget}; it must be a number of seconds, at least 0.\n"
    )


@pytest.mark.parametrize(
    "own",
    [
        "data.batch_size=16",
        "training.accumulation=2",
        "output=x",
        "hosts=single",
        "objective=jsd distill=on_policy distill.teacher=runs/teacher",
    ],
)
def test_plan_refuses_students_that_train_together_refuses(own, capsys):
    students = [*TOY, "--student", "one", "--student", "two", *own.split()]
    assert main(["train-together", *students[1:]]) == 1
    expected = capsys.readouterr().err
    assert expected.startswith("gemma2: ")
    assert main(["plan", "topology=cpu:8", *students[1:]]) == 1
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TOY, "topology is missing"),
        (
            [*TOY, "topology=cpu:8", "--student", "one", "topology=cpu:4"],
            "--student one: topology belongs to the plan, not to a student; put it before the first --student.",
        ),
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
