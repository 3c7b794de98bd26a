"""Missing inputs and unwritable folders are reported before a run's data is prepared."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.checkpoints.store import TOKENIZER_FILE
from gemma2_jax.config import UserError
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.tokenizer import train_tokenizer
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.training.prerequisites import check_places, check_sources
from tests.distill.test_cache import write_teacher


@pytest.fixture
def fresh(toy_run: RunConfig, tmp_path: Path) -> RunConfig:
    """A run whose data is not prepared, with the tokenizer of the toy run."""
    data = replace(toy_run.data, folder=str(tmp_path / "data"))
    objective = ObjectiveConfig(cross_entropy=0.5, forward_kl=0.5, temperature=1.0, block_tokens=48)
    distill = DistillConfig(str(tmp_path / "teacher"), "float32")
    return replace(toy_run, data=data, objective=objective, distill=distill, output=str(tmp_path / "run"))


def test_a_whole_teacher_passes(fresh: RunConfig, toy_run: RunConfig, tmp_path: Path) -> None:
    write_teacher(toy_run, Gemma2.init(toy_run.model, jax.random.key(0)), tmp_path / "teacher")
    check_places(fresh)
    check_sources([fresh, fresh])
    assert not Path(fresh.data.folder).exists()


def test_a_missing_teacher_is_named(fresh: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^distill\.teacher: {tmp_path}/teacher does not exist; accepted:"):
        check_sources([fresh])
    check_sources([fresh], made=["distill.teacher"])


def test_a_teacher_of_another_kind_is_named(fresh: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^distill\.teacher: .* holds GGUF"):
        check_sources([fresh])


def test_a_teacher_of_another_vocabulary_is_named(
    fresh: RunConfig, toy_run: RunConfig, texts: list[str], tmp_path: Path
) -> None:
    write_teacher(toy_run, Gemma2.init(toy_run.model, jax.random.key(0)), tmp_path / "teacher")
    train_tokenizer(texts[:60], tmp_path / "teacher" / TOKENIZER_FILE, 400)
    with pytest.raises(
        UserError, match=r"^distill\.teacher .* has the tokenizer .*; they must be the same\.$"
    ):
        check_sources([fresh])


def test_a_missing_cache_and_a_missing_beginning_are_named(fresh: RunConfig, tmp_path: Path) -> None:
    cached = replace(fresh, distill=DistillConfig(None, "float32", cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=rf"^distill\.cache {tmp_path}/cache holds no teacher's cache"):
        check_sources([cached])
    begun = replace(
        fresh, distill=DistillConfig(None, "float32"), objective=ObjectiveConfig(1.0, 0.0, 1.0, 48)
    )
    begun = replace(begun, initialise=InitConfig(str(tmp_path / "none")))
    with pytest.raises(UserError, match=rf"^initialise\.source: {tmp_path}/none does not exist"):
        check_sources([begun])


def test_a_folder_that_cannot_be_made_is_named(fresh: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "x")
    why = rf"which cannot be used: {tmp_path}/file is a file, where a folder is needed\.$"
    with pytest.raises(UserError, match=f"^output is {below}, {why}"):
        check_places(replace(fresh, output=below))
    with pytest.raises(UserError, match=f"^data.folder is {below}, {why}"):
        prepare(replace(fresh.data, folder=below), fresh.tokenizer)
    with pytest.raises(UserError, match=f"^tokenizer.path is {below}/x.model, {why}"):
        prepare(fresh.data, replace(fresh.tokenizer, path=f"{below}/x.model"))
