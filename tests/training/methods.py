"""A run of each method, with a teacher or a cache of its own, for tests of adaptations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.store import describe_params
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.weights import specs_by_path
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.teacher_cache import write_cache
from tests.training.stops import stopped_after

KL = ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48)
METHODS = ("text", "online", "matched", "cached", "on-policy")


def beside_frozen(
    toy_run: RunConfig, adaptation: AdaptationConfig, base: str, folder: Path, **changes: Any
) -> RunConfig:
    """A run of five steps on eight devices that starts from the base model and freezes some of its weights."""
    return replace(
        toy_run,
        output=str(folder / "run"),
        mesh=MeshConfig(1, 4, 2),
        data=replace(toy_run.data, batch_size=8),
        initialise=InitConfig(source=base),
        adaptation=adaptation,
        training=replace(toy_run.training, steps=5, eval_every=5),
        checkpoint=replace(toy_run.checkpoint, every=2),
        **changes,
    )


def resumed_and_whole(
    finished: RunConfig, method: str, teacher: str, folder: Path
) -> tuple[RunConfig, RunConfig]:
    """A run with one of `METHODS` that was stopped and resumed, and one that was not, `finished` if its method is text.

    Checks that their metrics are equal, and that the checkpoint holds what is trained alone.
    """
    resumed = with_method(finished, method, teacher, folder)
    whole = finished
    if method != "text":
        whole = replace(resumed, output=str(folder / "whole"))
        train(whole)
    with stopped_after(3):
        train(resumed)
    train(resumed)
    assert rows(resumed.output) == rows(whole.output)
    _, found = describe_params(resumed.output)
    specs = specs_by_path(build_method(resumed).specs["params"])
    assert {path: leaf.shape for path, leaf in found.items()} == {
        path: spec.shape for path, spec in specs.items()
    }
    return resumed, whole


def with_method(run: RunConfig, method: str, teacher: str, folder: Path) -> RunConfig:
    """The run with one of `METHODS`, in a folder of its own."""
    run = replace(run, name=method, output=str(folder / "run"))
    if method == "text":
        return run
    distill = DistillConfig(teacher, "float32")
    if method == "matched":
        distill = replace(distill, match=MatchConfig(((0, 0), (1, 1)), hidden=1.0))
    if method == "on-policy":
        distill = replace(distill, on_policy=OnPolicyConfig(fraction=0.5, prompt_tokens=8))
    if method == "cached":
        distill = replace(distill, cache=str(folder / "cache"), encoding=EncodingConfig("top_k", 8))
        write_cache(replace(run, objective=KL, distill=distill))
    return replace(run, objective=KL, distill=distill)


def rows(output: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics without its speed."""
    return [
        {name: value for name, value in row.items() if name not in ("tokens_per_second", "seconds", "mfu")}
        for row in read_metrics(output)
    ]
