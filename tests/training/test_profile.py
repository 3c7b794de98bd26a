"""The trace of some steps that `profile=true` writes."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.run import RunConfig
from gemma2_jax.training.loop import train


@pytest.fixture
def profiled(toy_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run traced at its second and third step, on one device."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    training = replace(toy_run.training, steps=4, eval_every=4, profile_steps=(2, 3))
    return replace(toy_run, output=str(tmp_path / "run"), profile=True, training=training)


# Of Python 3.12, about how JAX has built it.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")


def steps_in(trace: Path) -> set[int]:
    """The numbers of the steps that a trace holds."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    return {
        int(dict(event.stats)["step_num"])
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "step"
    }


@pytest.mark.thorough
def test_the_chosen_steps_are_traced(profiled: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(profiled)
    folder = Path(profiled.output, "profile")
    (trace,) = folder.rglob("*.xplane.pb")
    assert steps_in(trace) == {2, 3}
    assert f"the trace from step 2 on is in {folder}" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_without_steps_left_reports_that_there_is_no_trace(
    profiled: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(profiled, profile=False))  # its last checkpoint but one is at step 3
    for name in ("4", "metrics.jsonl"):
        path = Path(profiled.output, "checkpoints", name) if name == "4" else Path(profiled.output, name)
        path.rename(path.with_suffix(".away"))
    train(profiled)
    told = capsys.readouterr().err
    assert "training.profile_steps starts at step 2 of this process, which took only 1" in " ".join(
        told.split()
    )
    assert not Path(profiled.output, "profile").exists()


@pytest.mark.parametrize("steps", [(0, 1), (3, 2)])
def test_steps_that_are_none(profiled: RunConfig, steps: tuple[int, int]) -> None:
    with pytest.raises(
        UserError, match=r"training\.profile_steps is \[.*\]; it must be the first and the last step to trace"
    ):
        replace(profiled.training, profile_steps=steps)


def test_steps_after_the_last(profiled: RunConfig) -> None:
    with pytest.raises(UserError, match=r"training\.profile_steps ends with 9, after the last step \(4\)"):
        replace(profiled, training=replace(profiled.training, profile_steps=(2, 9)))
