"""Which changes of the configuration a run can be resumed with, and when a run counts as finished."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from orbax.checkpoint import v1 as ocp

from gemma2_jax.checkpoints.integrity import write_checkpoint_manifest
from gemma2_jax.checkpoints.store import CONFIG_FILE, find, latest_step
from gemma2_jax.config import UserError, load_config, save_config
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.distill.teacher_record import TEACHER_FILE
from gemma2_jax.files import write_text
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.sharding.layout import LayoutConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training import loop
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.resume import changes, check_same_run, older_schedule_note
from gemma2_jax.training.state import Update
from gemma2_jax.training.together import train_together
from tests.distill.test_cache import write_teacher
from tests.training.stops import stopped_after

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def done(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A student that is trained to its last step."""
    folder = tmp_path_factory.mktemp("done")
    config = replace(
        toy_run,
        output=str(folder / "run"),
        objective=ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher(toy_run, folder / "teacher", seed=1), "float32"),
        training=replace(toy_run.training, steps=2, eval_every=2),
        optimizer=replace(toy_run.optimizer, warmup_steps=1),
    )
    train(config)
    return config


def teacher(run: RunConfig, folder: Path, seed: int) -> str:
    return write_teacher(run, Gemma2.init(run.model, jax.random.key(seed)), folder)


def distilled_from(config: RunConfig, teacher: str | Path) -> RunConfig:
    return replace(config, distill=replace(config.distill, teacher=str(teacher)))


@pytest.mark.thorough
def test_one_that_is_done_was_distilled_from_the_same(
    done: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = teacher(done, tmp_path / "other", seed=2)
    with pytest.raises(
        UserError, match=r"was distilled from other weights .* than those of distill\.teacher .*other"
    ):
        train(distilled_from(done, other))
    train(distilled_from(done, shutil.copytree(str(done.distill.teacher), tmp_path / "moved")))
    monkeypatch.setattr(loop, "build_method", None)  # a teacher of the same name is not loaded
    train(done)


@pytest.mark.thorough
def test_a_run_of_an_older_version_keeps_to_its_teachers_path(done: RunConfig, tmp_path: Path) -> None:
    """Its record has another digest of the same weights, and is replaced when the run resumes."""
    run = replace(done, output=str(tmp_path / "run"))
    with stopped_after(1):
        train(run)
    older = {"identity": "0123456789abcdef", "encoding": None, "dtype": None}
    (tmp_path / "run" / TEACHER_FILE).write_text(json.dumps(older))
    moved = shutil.copytree(str(done.distill.teacher), tmp_path / "moved")
    with pytest.raises(UserError, match=rf"holds a run with distill\.teacher={done.distill.teacher}"):
        train(distilled_from(run, moved))
    train(run)
    assert latest_step(run.output) == 2
    train(distilled_from(run, moved))
    with pytest.raises(UserError, match="was distilled from other weights"):
        train(distilled_from(run, teacher(done, tmp_path / "other", seed=2)))


def test_a_finished_run_next_to_an_unfinished_one(done: RunConfig, tmp_path: Path) -> None:
    other = teacher(done, tmp_path / "other", seed=2)
    new = replace(distilled_from(done, other), name="new", output=str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"was distilled from other weights"):
        train_together([distilled_from(done, other), new])
    assert latest_step(new.output) is None


def test_one_that_is_done_was_trained_on_the_same_text(done: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(done.data.folder, tmp_path / "data")
    moved = replace(done, data=replace(done.data, folder=str(folder)))
    train(moved)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"identity": "other"}))
    with pytest.raises(UserError, match="was trained on other documents or with another tokenizer"):
        train(moved)


def test_parts_of_a_layout_may_change(done: RunConfig, tmp_path: Path) -> None:
    begun = replace(done, output=str(tmp_path), distill=replace(done.distill, layout=LayoutConfig()))
    save_config(begun, tmp_path / CONFIG_FILE)
    gathered = LayoutConfig(weights={"D": ()})
    check_same_run(replace(begun, layout=gathered, distill=replace(begun.distill, layout=gathered)))
    with pytest.raises(UserError, match=r"holds a run with distill\.dtype=float32, but .* is now bfloat16"):
        check_same_run(replace(begun, distill=replace(begun.distill, dtype="bfloat16")))


def test_a_run_begun_with_an_older_schedule_is_reported(toy_run: RunConfig, tmp_path: Path) -> None:
    config = replace(toy_run, output=str(tmp_path))
    assert older_schedule_note(config, 4) is None  # there is nothing to compare with
    rate = learning_rate_schedule(config.optimizer, config.training.steps)
    for late, line in ((0, None), (1, "step 4 had the learning rate 0.009")):
        rows = [
            {"step": step, "split": "train", "learning_rate": float(rate(step - 1 - late))}
            for step in range(1, 9)
        ]
        (tmp_path / JSON_LINES).write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = older_schedule_note(config, 4)
        assert message is None if line is None else line in (message or "")


def test_a_fraction_of_the_run_is_the_number_of_steps_that_it_comes_to(
    toy_run: RunConfig, tmp_path: Path
) -> None:
    begun = replace(toy_run, output=str(tmp_path))
    save_config(begun, tmp_path / CONFIG_FILE)
    check_same_run(replace(begun, optimizer=replace(begun.optimizer, warmup_steps=0.25)))  # 2 of 8
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps=2, but .* is now 4"):
        check_same_run(replace(begun, optimizer=replace(begun.optimizer, warmup_steps=0.5)))


def pretend(folder: Path, *steps: int) -> None:
    """Valid but empty checkpoints."""
    for step in steps:
        checkpoint = folder / "checkpoints" / str(step)
        write_text(checkpoint / "params" / "_METADATA", "{}")
        write_checkpoint_manifest(checkpoint)


TIMES = (
    "tokens_per_second",
    "seconds",
    "mfu",
)  # all that may differ between two runs of the same configuration
CONSTANT = {"schedule": "constant", "final_fraction": 1.0}
WSD = {"schedule": "wsd", "decay_steps": 2}
COSINE = ScheduleConfig("cosine", peak=2.0, end=1.0)


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Returns the configuration with these values in these sections."""
    return replace(
        config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def begun_with(
    config: RunConfig, folder: Path, done: tuple[int, ...], **sections: dict[str, Any]
) -> RunConfig:
    """A run folder with this configuration, and checkpoints at the steps that are done."""
    begun = replace(changed(config, **sections), output=str(folder))
    save_config(begun, folder / CONFIG_FILE)
    pretend(folder, *done)
    return begun


@pytest.mark.parametrize(
    ("done", "begun", "asked"),
    [
        ((6, 8), {"optimizer": CONSTANT}, {"training": {"steps": 12}}),
        ((6,), {"optimizer": CONSTANT}, {"training": {"steps": 6}}),
        ((6,), {"optimizer": WSD}, {"training": {"steps": 12}}),  # before its decay
        ((6,), {"optimizer": WSD}, {"optimizer": {"decay_steps": 1}}),
        ((6,), {"optimizer": WSD}, {"optimizer": {**CONSTANT, "decay_steps": 0}}),
        ((6,), {"optimizer": CONSTANT}, {"training": {"steps": 12}, "optimizer": {**WSD, "decay_steps": 6}}),
        ((), {}, {"training": {"steps": 12}}),  # nothing is done but the beginning
        ((8,), {}, {"training": {"eval_every": 2, "accumulation": 2}, "checkpoint": {"keep": 9}}),
        ((8,), {}, {"compute": {"remat": "full", "unroll_layers": True}, "objective": {"block_tokens": 16}}),
        ((8,), {}, {"tokenizer": {"vocab_size": None}, "distill": {"dtype": "bfloat16"}}),
        ((8,), {}, {"initialise": {"batches": 2}}),
    ],
)
def test_what_leaves_the_done_steps_as_they_are_is_allowed(
    toy_run: RunConfig, tmp_path: Path, done: tuple[int, ...], begun: dict[str, Any], asked: dict[str, Any]
) -> None:
    config = begun_with(toy_run, tmp_path, done, **begun)
    check_same_run(changed(config, **asked))
    if "steps" in asked.get("training", {}) or "optimizer" in asked:
        assert list(changes(config, changed(config, **asked)))  # it will end as another run


@pytest.mark.parametrize(
    ("done", "begun", "asked", "message"),
    [
        ((8,), {}, {"training": {"steps": 12}}, r"with training\.steps=8, but .* 12, .*optimizer\.schedule=cosine gives"
         r" another learning rate from step 3 on, .* write training\.steps=8, or choose another output"),
        ((6,), {}, {"training": {"steps": 7}}, r"training\.steps=8, but .* 7, .* optimizer\.schedule=cosine"),
        ((6, 8), {"optimizer": WSD}, {"training": {"steps": 12}}, r"optimizer\.schedule=wsd gives another learning rate"
         r" from step [78] on, .* write training\.steps=8, delete the checkpoints after 6 in .*checkpoints"),
        ((8,), {"optimizer": CONSTANT}, {"training": {"steps": 7}}, r"is already trained to step 8, but"
         r" training\.steps is 7; write training\.steps=8 or more"),
        ((8,), {"optimizer": CONSTANT}, {"training": {"steps": 12}, "optimizer": {"warmup_steps": 3}},
         r"optimizer\.warmup_steps=2, but .* is now 3; write optimizer\.warmup_steps=2"),
        ((8,), {}, {"optimizer": {"learning_rate": 0.02}}, r"optimizer\.learning_rate=0\.01, but .* is now 0\.02"),
        ((8,), {}, {"optimizer": {"clip_norm": 2.0}}, r"optimizer\.clip_norm=1\.0, but .* is now 2\.0; "
         r"write optimizer\.clip_norm=1\.0 to resume it, choose"),
        ((8,), {}, {"data": {"shuffle_buffer": 64}}, r"data\.shuffle_buffer=0, but .* is now 64; "
         r"write data\.shuffle_buffer=0 to resume it, choose another output"),
        ((8,), {}, {"data": {"text_field": "body"}}, r"write data\.text_field=text to resume it"),
        ((), {}, {"optimizer": {"learning_rate": 0.02}, "training": {"steps": 9}}, r"is now 0\.02"),
    ],
)  # fmt: skip
def test_what_changes_the_done_steps_is_refused(
    toy_run: RunConfig,
    tmp_path: Path,
    done: tuple[int, ...],
    begun: dict[str, Any],
    asked: dict[str, Any],
    message: str,
) -> None:
    config = begun_with(toy_run, tmp_path, done, **begun)
    if not done:  # with a first step that has a learning rate
        config = begun_with(toy_run, tmp_path, done, optimizer={"warmup_steps": 0})
    with pytest.raises(UserError, match=message):
        check_same_run(changed(config, **asked))


def test_schedules_of_the_objective_are_compared_by_their_values(done: RunConfig, tmp_path: Path) -> None:
    config = begun_with(
        changed(done, training={"steps": 8}, optimizer=CONSTANT),
        tmp_path,
        (4,),
        objective={"temperature": COSINE},
    )
    with pytest.raises(
        UserError, match=r"objective\.temperature\.kind=cosine gives another temperature from step 2 on"
    ):
        check_same_run(changed(config, training={"steps": 12}))
    constant = begun_with(config, tmp_path, (4,), objective={"temperature": 2.0})
    check_same_run(changed(constant, training={"steps": 12}))
    check_same_run(changed(constant, objective={"temperature": ScheduleConfig("constant", peak=2.0)}))
    later = ScheduleConfig("wsd", peak=2.0, end=1.0, decay_steps=2)
    check_same_run(changed(constant, objective={"temperature": later}))
    with pytest.raises(UserError, match=r"objective\.temperature=2\.0, but .* is now .*; write objective"):
        check_same_run(changed(constant, objective={"temperature": replace(later, decay_steps=6)}))


def test_own_samples_are_compared_by_their_steps(done: RunConfig, tmp_path: Path) -> None:
    def with_own(config: RunConfig, fraction: float | ScheduleConfig, prompt_tokens: int = 6) -> RunConfig:
        return changed(config, distill={"on_policy": OnPolicyConfig(fraction, prompt_tokens)})

    steps = changed(done, training={"steps": 30, "eval_every": 1}, optimizer=CONSTANT)
    config = begun_with(with_own(steps, 0.5), tmp_path, (20,))
    check_same_run(changed(config, training={"steps": 40}))
    with pytest.raises(UserError, match=r"on_policy\.prompt_tokens=6, but .* is now 5; write distill"):
        check_same_run(with_own(config, 0.5, prompt_tokens=5))
    falling = ScheduleConfig("linear", peak=1.0, end=0.0)
    config = begun_with(with_own(steps, falling), tmp_path, (20,))
    with pytest.raises(
        UserError, match=r"on_policy\.fraction\.kind=linear gives another choice of on-policy steps"
    ):
        check_same_run(changed(config, training={"steps": 300}))
    none_yet = ScheduleConfig("wsd", peak=0.0, end=1.0, decay_steps=5)
    config = begun_with(with_own(steps, none_yet), tmp_path, (20,))
    check_same_run(with_own(config, none_yet, prompt_tokens=5))


def rows_of(config: RunConfig, split: str) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(config.output) if row["split"] == split]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def last_state(config: RunConfig) -> Any:
    """Parameters and optimizer state of the last checkpoint."""
    found = find(config.output)
    assert found is not None
    update = Update(config, {"params": weight_specs(config.model)})
    state = update.abstract_state(build_mesh(config.mesh))
    trees = {"params": state.trainable["params"], "optimizer": state.optimizer["params"]}
    return ocp.load_checkpointables(found.path, trees)


@pytest.mark.thorough
def test_a_longer_run_is_the_uninterrupted_one(toy_run: RunConfig, tmp_path: Path) -> None:
    def of(steps: int, output: str) -> RunConfig:
        config = changed(
            toy_run, optimizer=CONSTANT, training={"steps": steps, "log_every": 3, "eval_every": 3}
        )
        return replace(config, output=str(tmp_path / output))

    train(of(5, "longer"))
    train(of(7, "longer"))
    train(of(7, "whole"))
    longer, whole = of(7, "longer"), of(7, "whole")
    assert load_config(RunConfig, Path(longer.output) / CONFIG_FILE) == longer
    chex.assert_trees_all_equal(last_state(longer), last_state(whole))
    # The old last step keeps its rows. Each step is in one average.
    assert [row["step"] for row in rows_of(longer, "train")] == [3, 5, 6, 7]
    assert [row["step"] for row in rows_of(whole, "train")] == [3, 6, 7]
    assert rows_of(longer, "train")[-1] == rows_of(whole, "train")[-1]
    validated = rows_of(longer, "validation")
    assert [row["step"] for row in validated] == [3, 5, 6, 7]
    assert [row for row in validated if row["step"] != 5] == rows_of(whole, "validation")

    before = (Path(longer.output) / "metrics.jsonl").read_text()
    train(longer)
    assert (Path(longer.output) / "metrics.jsonl").read_text() == before


@pytest.mark.thorough
def test_a_shorter_run_is_evaluated_at_its_end(toy_run: RunConfig, tmp_path: Path) -> None:
    config = changed(
        toy_run, optimizer=CONSTANT, training={"steps": 8, "eval_every": 8}, checkpoint={"every": 2}
    )
    config = replace(config, output=str(tmp_path / "run"))
    with stopped_after(3):
        train(config)
    shorter = changed(config, training={"steps": 2})
    train(shorter)
    whole = replace(shorter, output=str(tmp_path / "whole"))
    train(whole)
    assert rows_of(shorter, "train") == rows_of(whole, "train")
    assert rows_of(shorter, "validation") == rows_of(whole, "validation")


@pytest.mark.parametrize(
    "name", ["config.yaml", "tokenizer.model", "data.json", "teacher.json", "checkpoints"]
)
def test_what_is_missing_of_a_run_folder_is_named(done: RunConfig, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(done.output, tmp_path / "run"))
    shutil.move(run / name, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{run / name} is missing"):
        train(replace(done, output=str(run)))
    assert not (run / name).exists()  # nothing was begun anew


BROKEN = [b"\0\0\0\n\0\n", b"{\n", b"[1, 2]\n", b"\xff\xfe\n"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, b"") for name in ("config.yaml", "data.json", "teacher.json")),
        *(
            (name, text)
            for name in ("config.yaml", "data.json", "teacher.json", "metrics.jsonl")
            for text in BROKEN
        ),
    ],
)
def test_a_broken_file_of_a_run_folder_is_named(
    done: RunConfig, tmp_path: Path, name: str, content: bytes
) -> None:
    run = Path(shutil.copytree(done.output, tmp_path / "run"))
    (run / name).write_bytes(content)
    moved = shutil.copytree(str(done.distill.teacher), tmp_path / "moved")  # so that teacher.json is compared
    with pytest.raises(UserError, match=rf"{run / name}|{run} was (distilled|trained)"):
        train(replace(distilled_from(done, moved), output=str(run)))


def test_checkpoints_that_were_deleted_are_not_trained_over(done: RunConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done.output, tmp_path / "run"))
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match=r"holds no intact checkpoint: .*/checkpoints/2 is not intact"):
        train(replace(done, output=str(run)))


def test_a_converted_model_is_no_run_to_go_on_with(done: RunConfig, tmp_path: Path) -> None:
    teacher_folder = Path(str(done.distill.teacher))
    run = Path(shutil.copytree(teacher_folder, tmp_path / "run"))
    write_text(run / CONFIG_FILE, "model:\n  num_layers: 2\n")
    with pytest.raises(UserError, match=r"holds a converted model; .*initialise\.source="):
        train(replace(done, output=str(run)))
