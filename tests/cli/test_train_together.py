"""The command train-together: the configuration of each student, and rejected settings."""

import re
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.checkpoints.store import latest_step, load_model
from gemma2_jax.cli.compose import compose
from gemma2_jax.cli.main import main
from gemma2_jax.cli.student_options import compose_students
from gemma2_jax.config import UserError
from gemma2_jax.training.together import check_together

SHARED = ["objective=distillation", "distill=online", "distill.teacher=runs/teacher", "training.steps=60"]


def test_each_student_has_what_is_shared_and_its_own():
    wide, deep = compose_students(
        [*SHARED, "model=small_1m"], [["wide"], ["deep", "model.num_layers=8", "objective=jsd"]], None
    )
    assert (wide.name, wide.output, deep.output) == ("wide", "runs/wide", "runs/deep")
    assert (wide.model.num_layers, deep.model.num_layers) == (4, 8)
    assert (wide.objective.divergences, deep.objective.divergences) == (("forward_kl",), ("jsd",))
    assert wide.training == deep.training
    (inside,) = compose_students([*SHARED, "output=runs/family"], [["wide"]], None)
    assert inside.output == "runs/family/wide"


def test_what_each_makes_of_the_teacher_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in the command's description, and from a cache."""
    monkeypatch.chdir(tmp_path)
    Path("runs/teacher").mkdir(
        parents=True
    )  # a name without a folder belongs to the hub, whose package is an extra
    inside = ["inside", "model=small_1m", "distill=match", "distill.match.layers=[[1,3],[3,5]]"]
    scratch = ["scratch", "model=small_1m", "objective=cross_entropy", "distill.teacher=null"]
    taught, matching, text = compose_students(SHARED, [["wide", "model=small_1m"], inside, scratch], None)
    assert matching.distill.teacher == "runs/teacher"
    assert matching.distill.match is not None
    matching.distill.match.check_teacher(matching.model, compose(["model=small_6m"]).model)
    assert not text.distill.has_teacher
    check_together([taught, matching, text])
    of_a_cache = [*SHARED, "distill=cached", "distill.cache=runs/cache"]
    text_too = [*scratch, "distill.cache=null", "distill.encoding=null"]
    cached, text = compose_students(of_a_cache, [["small", "model=small_1m"], text_too], None)
    assert cached.distill.encoding is not None
    assert not text.distill.has_teacher
    check_together([cached, text])


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ([["a"], ["a"]], "--student a cannot name a run"),
        ([["model=toy"]], "--student model=toy cannot name"),
        (
            [["a", "output=x"]],
            "--student a: output is set by the student's name; put output=FOLDER before",
        ),
        (
            [["a", "hosts.process_id=1"]],
            "--student a: hosts.process_id belongs to the job, not to a student",
        ),
        ([["a", "hosts=single"]], "--student a: hosts belongs to the job"),
        ([["a"], ["b", "model=smal_1m"]], "--student b: there is no model smal_1m, did you mean small_1m"),
        ([["a"], ["b", "seed"]], "--student b: 'seed' cannot be read"),
    ],
)
def test_students_that_are_none(students, message):
    with pytest.raises(UserError, match=message):
        compose_students(SHARED, students, None)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ("name=family", "name=family has no effect, since each --student names its run; leave it out."),
        (
            "output=null",
            "output is null; it must be the parent folder of all run folders, as in output=runs/family.",
        ),
        (
            "output=",
            "output is empty; it must be the parent folder of all run folders, as in output=runs/family.",
        ),
    ],
)
def test_what_cannot_be_shared(shared, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compose_students([*SHARED, shared], [["a"]], None)


@pytest.mark.thorough
def test_from_the_command_line(corpus: Path, tmp_path: Path, capsys):
    command = [
        *(
            "train-together",
            "model=toy",
            "mesh.data=8",
            "data=files",
            f"data.source={corpus}",
            "data.batch_size=8",
        ),
        *(
            f"data.folder={tmp_path}/data",
            "data.seq_len=16",
            "tokenizer.vocab_size=400",
            f"output={tmp_path}/runs",
        ),
        *(
            "data.validation_fraction=0.2",
            "training.steps=2",
            "training.eval_every=2",
            "training.log_every=1",
        ),
        *("checkpoint.every=2", "optimizer.warmup_steps=1", "metrics.tensorboard=false"),
    ]
    assert main(command) == 1
    assert "there is no student to train" in capsys.readouterr().err
    assert main([*command, "--student", "one", "--student", "two", "seed=3"]) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path}/runs/{name} is trained to step 2.\n" for name in ("one", "two")
    )
    assert [latest_step(tmp_path / "runs" / name) for name in ("one", "two")] == [2, 2]
    one, two = (load_model(tmp_path / "runs" / name).params() for name in ("one", "two"))
    assert not np.array_equal(one["embedder"]["embedding"], two["embedder"]["embedding"])
    unprepared = [*command, f"data.folder={tmp_path}/other"]
    assert main([*unprepared, "--student", "one", "--student", "three", "data.seed=5"]) == 1
    assert "one has data.seed=0, but three has data.seed=5" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # refused before
