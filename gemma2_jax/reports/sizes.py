"""Parameters and model FLOPs of a run, from the configuration in its folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, build, read_yaml
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.stages import TEACHER_FILE


def read_sizes(config: Mapping[str, Any], folder: Path) -> tuple[int | None, float | None]:
    """Returns the number of parameters, and the FLOPs per token that training counts for `mfu`.

    Each is None if the configuration does not determine it. The teacher's sizes are those of the configuration, or else
    of the teacher's run folder, so that no weights are opened or downloaded.
    """
    try:
        run = build(RunConfig, config, str(folder))
    except UserError:  # an older version wrote the configuration
        return None, None
    return count_parameters(run.model).total, _flops_per_token(run, folder)


def _flops_per_token(run: RunConfig, folder: Path) -> float | None:
    distill = run.distill
    if distill.cache is not None:  # the teacher does not run in a training step
        distill = replace(distill, teacher=None, match=None)
    elif distill.teacher is not None and distill.model is None:
        model = _teacher_sizes(folder, Path(distill.teacher))
        if model is None:
            return None
        distill = replace(distill, model=model)
    try:
        return build_method(replace(run, distill=distill)).flops_per_token
    except UserError:  # the teacher was replaced by another one
        return None


def _teacher_sizes(folder: Path, teacher: Path) -> ModelConfig | None:
    for file in (folder / TEACHER_FILE, teacher / CONFIG_FILE):
        if file.is_file():
            try:
                return build(ModelConfig, read_yaml(file)["model"], str(file))
            except (UserError, KeyError):  # an older version, or not a run
                continue
    return None
