"""An adapter in a run folder, without training one."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE, save_params
from gemma2_jax.config import save_config, to_dict
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.formats.base_record import BaseRecord
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.load import open_source
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.weights import map_specs
from gemma2_jax.run import RunConfig


def write_adapter(
    run: RunConfig, base: Path, adaptation: AdaptationConfig, folder: Path, seed: int = 0
) -> Path:
    """A run folder as `train` leaves it, with an adapter of random numbers on the base's weights."""
    run = replace(run, output=str(folder), initialise=InitConfig(source=str(base)), adaptation=adaptation)
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    adapter = map_specs(
        lambda _, spec: 0.2 * jax.random.normal(next(keys), spec.shape), build_method(run).specs["params"]
    )
    save_params(folder, adapter, to_dict(run))
    save_config(run, folder / CONFIG_FILE)
    shutil.copy(run.tokenizer.path, folder / TOKENIZER_FILE)
    BaseRecord(str(base), source_identity(open_source(base))).save(folder)
    return folder
