"""A run of each method, with a teacher or a cache of its own, for tests of adaptations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.teacher_cache import write_cache

KL = ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48)
METHODS = ("text", "online", "matched", "cached", "on-policy")


def every_method(*fast: str) -> list[Any]:
    """The names of `METHODS` as parameters of a test, which are thorough ones except for `fast`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.thorough) for name in METHODS]


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
        {name: value for name, value in row.items() if name not in ("tokens_per_second", "mfu")}
        for row in read_metrics(output)
    ]
