"""A step that a plan has compiled is not compiled again by the run."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma2_jax.compilation import use_compilation_cache
from gemma2_jax.config import UserError
from gemma2_jax.data.config import TokenizerConfig
from gemma2_jax.data.prepare import prepare
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.planning.plan import plan
from gemma2_jax.planning.program import compile_step
from gemma2_jax.planning.topologies import find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.together import method_of, programs_of, train_together
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid


@pytest.fixture(autouse=True)
def everything_is_kept() -> Iterator[None]:
    before = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def cache_folder() -> Any:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("jit_step_as_laid_out-")]


@pytest.mark.thorough
def test_a_run_takes_the_step_that_a_plan_has_compiled(toy_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    mine = cache_folder()
    config = replace(
        toy_run,
        output=str(tmp_path / "run"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        compilation_cache=str(folder),
    )
    compile_step([config], find_topology("cpu:8"), build_method(config))
    planned = steps_in(folder)
    assert len(planned) == 1
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    train(config)
    assert steps_in(folder) == planned  # under the same name there is the same program
    assert "/jax/compilation_cache/cache_hits" in hits
    assert len(list(folder.iterdir())) > 1  # of the run's other programs
    assert cache_folder() == mine


@pytest.mark.thorough
def test_a_plan_has_the_vocabulary_of_prepared_data(toy_run: RunConfig, tmp_path: Path) -> None:
    """The text supports fewer tokens than requested; the planned program is then the trained program."""
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(f'{{"text": "note {number} of few words"}}\n' for number in range(400)))
    data = replace(toy_run.data, source=str(source), folder=str(tmp_path / "data"), batch_size=8)
    config = replace(
        toy_run,
        output=str(tmp_path / "run"),
        model=replace(toy_run.model, vocab_size=4096),
        tokenizer=TokenizerConfig(str(tmp_path / "data" / "tokenizer.model"), 4096),
        data=data,
        mesh=MeshConfig(data=8),
        training=replace(toy_run.training, steps=2, eval_every=2),
        compilation_cache=str(tmp_path / "compiled"),
    )
    unprepared = plan(config, "cpu:8")
    assert unprepared.parameters == {"toy": count_parameters(config.model).total}
    assert not Path(data.folder).exists()

    size = prepare(data, config.tokenizer).vocab_size
    assert size < 4096
    prepared = plan(config, "cpu:8")
    assert prepared.parameters == {"toy": count_parameters(replace(config.model, vocab_size=size)).total}
    planned = steps_in(tmp_path / "compiled")
    assert len(planned) == 2
    train(config)
    assert steps_in(tmp_path / "compiled") == planned


@pytest.mark.thorough
def test_students_load_the_step_that_a_plan_compiled(
    toy_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planned program is the trained program, and needs the same memory."""
    folder = tmp_path / "compiled"
    found: list[Any] = []
    small = replace(
        toy_run,
        name="small",
        output=str(tmp_path / "small"),
        data=replace(toy_run.data, batch_size=8),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        objective=ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(
            write_teacher(toy_run, vivid(replace(toy_run.model, d_model=48)), tmp_path / "teacher"), "float32"
        ),
        training=replace(toy_run.training, steps=2, eval_every=2),
        compilation_cache=str(folder),
    )
    text = replace(
        small,
        name="text",
        output=str(tmp_path / "text"),
        model=replace(small.model, num_layers=4),
        objective=toy_run.objective,
        distill=toy_run.distill,
    )
    (runs,) = programs_of([text, small])
    planned = compile_step(runs, find_topology("cpu:8"), method_of(runs)).memory
    kept = steps_in(folder)
    assert len(kept) == 1
    compile_lowered = jax.stages.Lowered.compile

    def watched(self: jax.stages.Lowered, *arguments: Any) -> jax.stages.Compiled:
        compiled = compile_lowered(self, *arguments)
        found.append(compiled.memory_analysis())
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", watched)
    train_together([text, small])
    assert steps_in(folder) == kept
    (step,) = found
    assert (planned.argument, planned.temp) == (step.argument_size_in_bytes, step.temp_size_in_bytes)
    assert planned.peak == planned.argument + step.temp_size_in_bytes + (
        step.output_size_in_bytes - step.alias_size_in_bytes
    )


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("gs://bucket/folder", "which needs the package gcsfs"),
        ("ftp://host/folder", "accepted: a folder, or a bucket"),
    ],
)
def test_buckets_that_are_not_writable_are_reported(
    folder: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with (
        pytest.raises(UserError, match=f"compilation_cache is {folder}.*{message}"),
        use_compilation_cache(folder),
    ):
        pass


def test_a_path_that_cannot_be_a_folder_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(
            UserError,
            match=r"compilation_cache is .*file/cache, which cannot be used: .*file is a file, where a folder",
        ),
        use_compilation_cache(f"{file}/cache"),
    ):
        pass
