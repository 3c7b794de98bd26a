"""Whole toy runs: the files they write, and that an interrupted run resumes with identical results."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import find, latest_step, load_model
from gemma2_jax.config import UserError, load_config, save_config
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.distill.rollouts import OnPolicyConfig, on_policy_steps
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.files import locked
from gemma2_jax.machine import describe_machine
from gemma2_jax.methods import language_modelling
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.training import loop
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.run_folder import Rows, RunFolder
from tests.training.stops import stopped_after

pytestmark = pytest.mark.usefixtures("one_device")

TIMES = (
    "tokens_per_second",
    "seconds",
    "mfu",
)  # all that may differ between two runs of the same configuration


def without_times(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def finished(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was never interrupted."""
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("runs") / "whole"),
        data=replace(toy_run.data, shuffle_buffer=10),
    )
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)
        train(config)
    return config


def test_what_a_run_leaves(finished: RunConfig) -> None:
    folder = Path(finished.output)
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.yaml", "data.json", "tokenizer.model", "machine.txt", "metrics.jsonl", "checkpoints"
    }  # fmt: skip
    assert (folder / "machine.txt").read_text() == f"{describe_machine(jax.devices()[:1])}\n"
    assert load_config(RunConfig, folder / "config.yaml") == finished
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [6, 8]  # the newest two
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["split"] == "validation"] == [8]
    assert all(row["seconds"] > 0 for row in rows if row["split"] == "train")
    first, last = rows[0], rows[-1]
    assert first["perplexity"] == pytest.approx(np.exp(first["cross_entropy"]))
    assert first["learning_rate"] == pytest.approx(5e-3)
    assert rows[1]["learning_rate"] == pytest.approx(1e-2)
    assert rows[7]["learning_rate"] == pytest.approx(1e-3)
    assert all(row[name] > 0 for row in rows[:8] for name in (*TIMES, "gradient_norm"))
    assert rows[7]["tokens_seen"] == 8 * 4 * 32
    assert last["cross_entropy"] < first["cross_entropy"] - 0.5
    # One name has one meaning: `loss` is the objective, and no evaluation has one.
    assert {"loss", "tokens_seen"} & set(last) == {"tokens", "targets"} & set(first) == set()
    assert 0 < last["targets"] == int(last["targets"])


# Between two checkpoints; before any, at one, and near the end.
@pytest.mark.parametrize(
    "cut_after", [5, *(pytest.param(step, marks=pytest.mark.thorough) for step in (2, 3, 7))]
)
def test_a_resumed_run_is_bit_identical(finished: RunConfig, cut_after: int, tmp_path: Path) -> None:
    config = replace(finished, output=str(tmp_path / "cut"))
    with stopped_after(cut_after + 1):
        train(config)
    assert latest_step(config.output) == (cut_after // 3 * 3 or None)
    with open(Path(config.output) / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "spl')  # killed in the middle of a line
    train(config)
    assert without_times(Path(config.output)) == without_times(Path(finished.output))
    resumed, whole = load_model(config.output), load_model(finished.output)
    chex.assert_trees_all_equal(resumed.params(), whole.params())


@pytest.mark.thorough
def test_a_run_that_was_trained_to_a_rung_goes_on_bit_exactly(finished: RunConfig, tmp_path: Path) -> None:
    config = replace(finished, output=str(tmp_path / "promoted"))
    for step in (4, 6):  # between two checkpoints, and at one
        train(config, until=step)
        assert latest_step(config.output) == step
        # The learning rates are those of all eight steps, and the last step's evaluation is not yet made.
        assert without_times(Path(config.output)) == without_times(Path(finished.output))[:step]
    train(config)
    assert without_times(Path(config.output)) == without_times(Path(finished.output))
    chex.assert_trees_all_equal(load_model(config.output).params(), load_model(finished.output).params())


@pytest.mark.thorough
def test_a_run_goes_on_from_the_one_before_a_broken_checkpoint(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    for file in (run / "checkpoints" / "8").rglob("*"):
        if file.is_file():
            file.unlink()
    config = replace(finished, output=str(run))
    train(config)
    printed = " ".join(capsys.readouterr().err.split())
    assert "resumes from its checkpoint at step 6" in printed
    assert "checkpoints/8 is not intact" in printed
    assert without_times(run) == without_times(Path(finished.output))
    chex.assert_trees_all_equal(load_model(run).params(), load_model(finished.output).params())


@pytest.mark.thorough
def test_flipped_bits_are_trained_again(finished: RunConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "8")
    with stopped_after(8):  # at step 6 again, which is the newest
        train(replace(finished, output=str(run)))
    largest = max((run / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 64
    largest.write_bytes(content)
    with pytest.raises(
        UserError, match=r"holds no intact checkpoint: .*checkpoints/6 is not intact \(.* has changed"
    ):
        train(replace(finished, output=str(run)))


def test_a_finished_run_that_is_damaged_is_trained_again(finished: RunConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    largest = max((run / "checkpoints" / "8").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 64
    largest.write_bytes(content)
    train(replace(finished, output=str(run)))
    found = find(run)
    assert found is not None
    assert (found.step, found.skipped) == (8, ())


def scheduled(finished: RunConfig, output: Path) -> RunConfig:
    """Distilled from `finished` by a mixture whose weights and temperature change."""
    objective = ObjectiveConfig(
        cross_entropy=1.0,
        forward_kl=0.0,
        jsd=1.0,
        temperature=ScheduleConfig("cosine", peak=2.0, end=1.0),
        mix=ScheduleConfig("wsd", start=0.0, peak=1.0, end=0.0, warmup_steps=2, decay_steps=3),
        block_tokens=48,
    )
    distill = replace(finished.distill, teacher=finished.output)
    return replace(finished, objective=objective, distill=distill, seed=1, output=str(output))


@pytest.mark.thorough
def test_a_scheduled_run_logs_its_values_and_resumes_with_them(finished: RunConfig, tmp_path: Path) -> None:
    whole = scheduled(finished, tmp_path / "whole")
    train(whole)
    rows = read_metrics(whole.output)
    assert [row["mix"] for row in rows[:8]] == pytest.approx([0, 0.5, 1, 1, 1, 2 / 3, 1 / 3, 0])
    assert rows[0]["temperature"] == 2.0
    assert [rows[3]["temperature"] + rows[4]["temperature"], rows[7]["temperature"]] == pytest.approx([3, 1])
    for row in rows[:8]:
        expected = row["mix"] * row["jsd"] + (1 - row["mix"]) * row["cross_entropy"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert "kl" not in row
    assert {"kl", "agreement", "acceptance", "entropy", "teacher_entropy"} <= set(rows[8])

    cut = replace(whole, output=str(tmp_path / "cut"))
    with stopped_after(5):
        train(cut)
    assert latest_step(cut.output) == 3
    train(cut)
    assert without_times(Path(cut.output)) == without_times(Path(whole.output))
    chex.assert_trees_all_equal(load_model(cut.output).params(), load_model(whole.output).params())


def on_policy(finished: RunConfig, output: Path, fraction: float) -> RunConfig:
    """Distilled from `finished` by the reverse KL, on its own samples at some steps."""
    distill = DistillConfig(finished.output, "float32", on_policy=OnPolicyConfig(fraction, prompt_tokens=6))
    objective = ObjectiveConfig(0.0, 0.0, 1.0, block_tokens=48, reverse_kl=1.0)
    return replace(finished, objective=objective, distill=distill, seed=1, output=str(output))


@pytest.mark.thorough
def test_an_on_policy_run_logs_its_steps_and_resumes_with_them(finished: RunConfig, tmp_path: Path) -> None:
    whole = on_policy(finished, tmp_path / "whole", fraction=0.5)
    train(whole)
    rows = [row for row in read_metrics(whole.output) if row["split"] == "train"]
    expected = on_policy_steps(OnPolicyConfig(0.5, 6), seed=1, steps=8)
    assert [row["on_policy"] for row in rows] == expected.tolist()
    assert {True, False} == set(expected[3:].tolist())  # both after the checkpoint that it resumes from
    assert all(row["loss"] == row["reverse_kl"] > 0 for row in rows)
    of_text = {"cross_entropy", "perplexity"}
    for row in rows:  # its own samples are no text to be perplexed by
        assert of_text & set(row) == (set() if row["on_policy"] else of_text)
        assert ("sampled_cross_entropy" in row) == row["on_policy"]

    cut = replace(whole, output=str(tmp_path / "cut"))
    with stopped_after(5):
        train(cut)
    assert latest_step(cut.output) == 3
    train(cut)
    assert without_times(Path(cut.output)) == without_times(Path(whole.output))
    chex.assert_trees_all_equal(load_model(cut.output).params(), load_model(whole.output).params())


@pytest.mark.thorough
def test_the_share_of_on_policy_steps_is_an_average_like_any_other(
    finished: RunConfig, tmp_path: Path
) -> None:
    training = replace(finished.training, steps=4, log_every=4, eval_every=4)
    config = replace(
        on_policy(finished, tmp_path, fraction=0.5),
        training=training,
        checkpoint=replace(finished.checkpoint, every=4),
    )
    train(config)
    (row,) = (row for row in read_metrics(tmp_path) if row["split"] == "train")
    assert row["on_policy"] == np.mean(on_policy_steps(OnPolicyConfig(0.5, 6), seed=1, steps=4))
    assert {"cross_entropy", "sampled_cross_entropy"} <= set(row)
    assert row["perplexity"] == pytest.approx(np.exp(row["cross_entropy"]))


@pytest.mark.thorough
def test_without_on_policy_steps_a_run_is_as_without_the_setting(finished: RunConfig, tmp_path: Path) -> None:
    never = on_policy(finished, tmp_path / "never", fraction=0.0)
    without = replace(never, output=str(tmp_path / "without"), distill=replace(never.distill, on_policy=None))
    train(never)
    train(without)
    rows = without_times(Path(never.output))
    assert [row.pop("on_policy") for row in rows[:8]] == [0.0] * 8
    assert rows == without_times(Path(without.output))


def test_another_schedule_in_the_same_folder_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    begun = scheduled(finished, tmp_path)
    save_config(begun, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r'objective.mix=\{"kind": "wsd", .*\}, but .* is now 0.5'):
        train(replace(begun, objective=replace(begun.objective, mix=0.5)))
    longer = ScheduleConfig("cosine", peak=3.0, end=1.0)
    with pytest.raises(UserError, match=r"objective.temperature.peak=2.0, but .* is now 3.0"):
        train(replace(begun, objective=replace(begun.objective, temperature=longer)))


def test_a_folder_from_before_there_were_other_terms(finished: RunConfig, tmp_path: Path) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    new = ("reverse_kl", "jsd", "skew", "z_loss", "mix:")
    (run / "config.yaml").write_text("".join(line for line in lines if not line.strip().startswith(new)))
    assert len((run / "config.yaml").read_text().splitlines()) == len(lines) - 8
    shutil.rmtree(run / "checkpoints" / "8")
    train(replace(finished, output=str(run)))
    assert without_times(run) == without_times(Path(finished.output))


def test_a_finished_run_is_left_alone(finished: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (Path(finished.output) / "metrics.jsonl").read_text()
    monkeypatch.setattr(loop, "train_method", None)  # nothing is started
    train(finished)
    assert (Path(finished.output) / "metrics.jsonl").read_text() == before


@pytest.mark.thorough
def test_repeated_from_its_own_config_file_alone(finished: RunConfig, tmp_path: Path) -> None:
    saved = load_config(RunConfig, Path(finished.output) / "config.yaml")
    train(replace(saved, output=str(tmp_path / "again")))
    assert without_times(tmp_path / "again") == without_times(Path(finished.output))


def test_another_configuration_in_the_same_folder_is_refused(finished: RunConfig) -> None:
    other = replace(finished, optimizer=replace(finished.optimizer, learning_rate=5e-3))
    with pytest.raises(UserError, match=r"optimizer.learning_rate=0.01, but .* is now 0.005"):
        train(other)


@pytest.mark.thorough
def test_logged_averages_cover_every_step_once(finished: RunConfig, tmp_path: Path) -> None:
    training = replace(finished.training, log_every=2, eval_every=8)
    config = replace(
        finished, output=str(tmp_path), training=training, checkpoint=replace(finished.checkpoint, every=4)
    )
    train(config)
    each = [row["loss"] for row in read_metrics(finished.output) if row["split"] == "train"]
    pairs = [row["loss"] for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert pairs == pytest.approx([(each[i] + each[i + 1]) / 2 for i in range(0, 8, 2)], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = train_batches(finished.data)

    class Poisoned:
        def __next__(self) -> object:
            batch = next(batches)
            return replace(batch, loss_mask=batch.loss_mask * np.float32("nan"))

        def get_state(self) -> None: ...

        def set_state(self, state: None) -> None: ...

    monkeypatch.setattr(language_modelling, "train_batches", lambda *_: Poisoned())
    with pytest.raises(UserError, match=" is nan; try a lower"):
        train(replace(finished, output=str(tmp_path)))
    assert latest_step(tmp_path) is None


def test_data_prepared_with_another_tokenizer_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.data.folder, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))
    config = replace(finished, output=str(tmp_path / "run"), data=replace(finished.data, folder=str(folder)))
    with pytest.raises(UserError, match="was prepared with tokenizer 000000000000"):
        train(config)


def test_data_prepared_anew_from_other_text_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "8")  # not finished, so that it would go on
    folder = shutil.copytree(finished.data.folder, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"identity": "other"}))
    config = replace(finished, output=str(run), data=replace(finished.data, folder=str(folder)))
    with pytest.raises(UserError, match="was trained on other documents or with another tokenizer"):
        train(config)


def test_no_validation_documents_is_refused_at_once(finished: RunConfig, tmp_path: Path) -> None:
    data = replace(finished.data, folder=str(tmp_path / "data"), validation_fraction=0.0)
    prepare(data, finished.tokenizer)
    with pytest.raises(UserError, match="has no validation documents"):
        train(replace(finished, output=str(tmp_path / "run"), data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_run_goes_on_where_its_data_was_moved_to(finished: RunConfig, tmp_path: Path) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "8")
    folder = shutil.copytree(finished.data.folder, tmp_path / "data")
    data = replace(finished.data, folder=str(folder), workers=2)
    train(replace(finished, output=str(run), data=data))
    assert without_times(run) == without_times(Path(finished.output))


def test_two_processes_in_one_folder(finished: RunConfig, tmp_path: Path) -> None:
    config = replace(finished, output=str(tmp_path / "run"))
    with (
        locked(config.output, wait=False),
        pytest.raises(UserError, match="is being trained by another process"),
    ):
        train(config)


def test_a_refused_run_leaves_no_configuration(finished: RunConfig, tmp_path: Path) -> None:
    """Otherwise the corrected command would be rejected for another reason."""
    distilled = replace(
        finished,
        output=str(tmp_path / "run"),
        objective=replace(finished.objective, forward_kl=1.0),
        distill=replace(finished.distill, teacher=str(tmp_path / "nobody")),
    )
    with pytest.raises(UserError, match="does not exist; accepted"):
        train(distilled)
    assert not any(tmp_path.iterdir())


def test_a_refused_run_leaves_a_folder_that_was_there(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    distill = replace(finished.distill, teacher=str(tmp_path / "nobody"))
    objective = replace(finished.objective, forward_kl=1.0)
    with pytest.raises(UserError, match="does not exist; accepted"):
        train(replace(finished, output=str(tmp_path), objective=objective, distill=distill))
    assert (tmp_path / "note.txt").exists()


@pytest.mark.thorough
def test_a_student_resumes_with_the_same_teacher_in_another_folder(
    finished: RunConfig, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished.output, tmp_path / "moved")
    objective = ObjectiveConfig(0.0, 1.0, 1.0, block_tokens=48)
    distill = replace(finished.distill, teacher=finished.output)
    student = replace(finished, output=str(tmp_path / "run"), objective=objective, distill=distill)
    with stopped_after(5):
        train(student)
    other = shutil.copytree(moved, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "8")  # of which step 6 is left: other weights
    with pytest.raises(
        UserError, match=r"run was distilled from other weights .* those of distill\.teacher .*/other"
    ):
        train(replace(student, distill=replace(distill, teacher=str(other))))
    train(replace(student, distill=replace(distill, teacher=str(moved))))
    assert latest_step(student.output) == 8


@pytest.mark.thorough
def test_weights_that_broke_are_not_saved(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss with an infinite gradient breaks the weights after the step, and the loss only later."""
    log = RunFolder.log

    def with_infinite_gradient(self: RunFolder, step: int, rows: Rows, seconds: float) -> None:
        log(self, step, [{**row, "gradient_norm": jnp.float32("inf")} for row in rows], seconds)

    monkeypatch.setattr(RunFolder, "log", with_infinite_gradient)
    with pytest.raises(UserError, match="gradient_norm is inf"):
        train(replace(finished, output=str(tmp_path), checkpoint=replace(finished.checkpoint, every=1)))
    assert latest_step(tmp_path) is None


@pytest.mark.parametrize(("rows", "padding"), [(300, 0), (500, 0), (400, 1)])
def test_another_number_of_tokens_than_the_tokenizers_is_refused(
    finished: RunConfig, tmp_path: Path, rows: int, padding: int
) -> None:
    model = replace(finished.model, vocab_size=rows, vocab_padding=padding)
    with pytest.raises(UserError, match=rf"has 400 tokens and the model {rows - padding}; model.vocab_size "):
        train(replace(finished, output=str(tmp_path), model=model))


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", jax.local_devices)  # all eight
    config = replace(finished, output=str(tmp_path), mesh=replace(finished.mesh, data=8))
    with pytest.raises(UserError, match=r"4 rows, which mesh\.replica"):
        train(config)


def test_a_foreign_config_file_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    save_config(finished.model, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml"):
        train(replace(finished, output=str(tmp_path)))
