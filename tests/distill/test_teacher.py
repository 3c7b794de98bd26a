"""Distilling from a run folder: the student improves, only it is saved, and incompatible teachers are rejected."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE, CheckpointStore, load_model, save_params
from gemma2_jax.config import UserError, build, save_config, to_dict
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.distill.teacher import DistillConfig, load_teacher
from gemma2_jax.evaluation.evaluate_run import evaluate_run
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import dim_sizes, weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.objectives.terms import forward_kl
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import LayoutConfig, check_activations, on_mesh
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.state import Update
from gemma2_jax.training.step import build_evaluation_step


@pytest.fixture(scope="module")
def teacher(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A trained teacher, wider than the student, on all eight devices."""
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("runs") / "teacher"),
        model=replace(toy_run.model, d_model=48, num_layers=4),
        mesh=MeshConfig(2, 2, 2),
    )
    train(config)
    return config


@pytest.fixture(scope="module")
def distilled(toy_run: RunConfig, teacher: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A student on another mesh than its teacher was trained on."""
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("runs") / "distilled"),
        mesh=MeshConfig(1, 4, 2),
        objective=ObjectiveConfig(0.0, 1.0, 1.0, 48),
        distill=DistillConfig(teacher.output, "bfloat16"),
        training=replace(toy_run.training, steps=12, eval_every=6),
    )
    train(config)
    return config


@pytest.mark.thorough
def test_the_student_approaches_the_teacher(distilled: RunConfig, teacher: RunConfig) -> None:
    rows = [row for row in read_metrics(distilled.output) if row["split"] == "validation"]
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[1]["kl"] < rows[0]["kl"]
    train_rows = [row for row in read_metrics(distilled.output) if row["split"] == "train"]
    assert [row["loss"] for row in train_rows] == pytest.approx([row["kl"] for row in train_rows], rel=1e-6)
    assert train_rows[-1]["kl"] < 0.7 * train_rows[0]["kl"]
    compared = evaluate_run(distilled.output, teacher.output)
    assert compared.kl == pytest.approx(
        rows[1]["kl"], rel=0.02
    )  # in float32 here, with a bfloat16 teacher there
    assert compared.agreement is not None
    assert 0 < compared.agreement <= 1


@pytest.mark.thorough
def test_the_student_alone_is_checkpointed(distilled: RunConfig) -> None:
    """Loading rejects arrays that the student does not have; besides its weights, only optimizer state is saved."""
    checkpoint = Path(distilled.output, "checkpoints", "12")
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {"params", "optimizer", "data"}
    student = load_model(distilled.output)
    assert student.config == distilled.model
    update = Update(distilled, {"params": weight_specs(distilled.model)})
    abstract = update.abstract_state(build_mesh(distilled.mesh))
    with CheckpointStore(distilled.output, keep=2) as store:
        targets = {"params": abstract.trainable["params"], "optimizer": abstract.optimizer["params"]}
        store.restore(12, targets, train_batches(distilled.data))  # refuses anything more, or less


@pytest.mark.thorough
def test_the_teacher_has_its_own_dtype_and_the_students_mesh(
    distilled: RunConfig, toy_run: RunConfig
) -> None:
    mesh = build_mesh(MeshConfig(2, 2, 2))
    tokenizer = Tokenizer.load(toy_run.tokenizer.path)
    teacher = load_teacher(distilled.distill, toy_run.model, tokenizer, mesh)
    leaves = jax.tree.leaves(teacher.params())
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    embedding = teacher.params()["embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 4  # fsdp x tensor


@pytest.mark.thorough
@pytest.mark.parametrize(("teachers", "students"), [(16, 0), (0, 24)])
def test_rows_may_differ_where_tokens_do_not(
    toy_run: RunConfig, tmp_path: Path, teachers: int, students: int
) -> None:
    """Teacher and student may have different padding of the vocabulary: the KL is over the tokens only."""

    def model(seed: int, padding: int, **sizes: int) -> Gemma2:
        config = replace(toy_run.model, vocab_size=400 + padding, vocab_padding=padding, **sizes)
        return Gemma2.init(config, jax.random.key(seed))

    teacher, student = model(0, teachers, d_model=48), model(1, students)
    config = replace(toy_run, output=str(tmp_path), model=teacher.config)
    save_config(config, tmp_path / CONFIG_FILE)
    shutil.copy(toy_run.tokenizer.path, tmp_path / TOKENIZER_FILE)
    save_params(tmp_path, teacher.params(), to_dict(config))

    distill = DistillConfig(str(tmp_path), "float32")
    mesh = build_mesh(MeshConfig(1, 4, 2))
    batch = next(train_batches(toy_run.data))
    with jax.set_mesh(mesh):
        loaded = load_teacher(distill, student.config, Tokenizer.load(toy_run.tokenizer.path), mesh)
        objective = ObjectiveConfig(0.0, 1.0, 1.0, 48)
        method = build_method(replace(toy_run, model=student.config, objective=objective, distill=distill))
        step = build_evaluation_step(method)
        sums = step({"params": student.params()}, {"teacher": loaded}, on_mesh(batch, mesh))
    assert loaded.config.vocab_size == student.config.vocab_size
    assert len(loaded.params()["embedder"]["embedding"].sharding.device_set) == 8

    read = jax.jit(lambda model: model(batch.tokens, batch.positions, batch.segment_ids)[..., :400])
    kl = forward_kl(read(student), read(teacher), temperature=1.0)
    assert float(sums["kl"]) == pytest.approx(float(jnp.sum(kl * batch.loss_mask)), rel=1e-5)


@pytest.mark.thorough
def test_another_vocabulary_is_refused(distilled: RunConfig, toy_run: RunConfig) -> None:
    student = replace(toy_run.model, vocab_size=600, vocab_padding=100)
    with pytest.raises(UserError, match=r"holds a model with 400 tokens, but the configuration has 500"):
        load_teacher(
            distilled.distill, student, Tokenizer.load(toy_run.tokenizer.path), build_mesh(MeshConfig())
        )


@pytest.mark.thorough
def test_another_tokenizer_is_refused(
    teacher: RunConfig, toy_run: RunConfig, texts: list[str], tmp_path: Path
) -> None:
    other = train_tokenizer(texts[::2], tmp_path / "other.model", 400)
    with pytest.raises(
        UserError,
        match=f"but tokenizer.path is {other.fingerprint[:12]} of 400 tokens; they must be the same",
    ):
        load_teacher(DistillConfig(teacher.output, "float32"), toy_run.model, other, build_mesh(MeshConfig()))


def test_no_teacher_there(toy_run: RunConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(toy_run.tokenizer.path)
    with pytest.raises(UserError, match="holds no checkpoint of a known kind"):
        load_teacher(
            DistillConfig(str(tmp_path), "float32"), toy_run.model, tokenizer, build_mesh(MeshConfig())
        )


def test_a_teacher_that_was_never_trained(teacher: RunConfig, toy_run: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher.output, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    tokenizer = Tokenizer.load(toy_run.tokenizer.path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_teacher(
            DistillConfig(str(folder), "float32"), toy_run.model, tokenizer, build_mesh(MeshConfig())
        )


def test_a_teacher_of_other_sizes_than_planned_is_refused(teacher: RunConfig, toy_run: RunConfig) -> None:
    planned = replace(teacher.model, num_layers=6)
    with pytest.raises(UserError) as error:
        load_teacher(
            DistillConfig(teacher.output, "float32", model=planned),
            toy_run.model,
            Tokenizer.load(toy_run.tokenizer.path),
            build_mesh(MeshConfig()),
        )
    assert str(error.value) == (
        f"distill.model.num_layers is 6, but distill.teacher {teacher.output} has {teacher.model.num_layers}; set "
        "distill.model to the teacher's sizes, or to null."
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "layout.activations.K splits dimension K (2)"),
        (LayoutConfig(head=("fsdp",)), "distill.layout.activations.K splits dimension K (2)"),
        (LayoutConfig(activations={}, head=()), "mesh.tensor is 4, which does not divide dimension K (2)"),
    ],
)
def test_a_mesh_that_does_not_divide_the_teacher(
    layout: LayoutConfig | None, message: str, teacher: RunConfig, toy_run: RunConfig
) -> None:
    """The mesh does divide the student, which has other sizes."""
    student = replace(toy_run.model, num_kv_heads=4)
    distill = DistillConfig(teacher.output, "float32", layout=layout)
    mesh = build_mesh(MeshConfig(data=2, tensor=4))
    check_activations(mesh, dim_sizes(student))
    with pytest.raises(UserError) as error:
        load_teacher(distill, student, Tokenizer.load(toy_run.tokenizer.path), mesh)
    assert str(error.value).startswith(f"{message} of distill.teacher {teacher.output} ")


def test_sizes_of_a_teacher_that_cannot_be(toy_run: RunConfig) -> None:
    values = to_dict(toy_run)
    values["distill"] |= {"teacher": "runs/teacher", "model": {**values["model"], "num_layers": 3}}
    with pytest.raises(UserError, match=r"here: distill\.model\.num_layers is 3; it must be even"):
        build(RunConfig, values, "here")
