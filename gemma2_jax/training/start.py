"""What is checked, and written into the run folder, before anything is computed."""

import os
import shutil
from pathlib import Path

from jax.sharding import Mesh

from gemma2_jax.config import UserError, load, save, to_dict
from gemma2_jax.data.shards import read_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.teacher import TOKENIZER_FILE
from gemma2_jax.sharding.layout import batch_shares
from gemma2_jax.training.config import RunConfig

CONFIG_FILE = "config.yaml"

# What may differ between the configuration that a run began with and the one that goes on with it.
_MAY_CHANGE = ("mesh", "metrics", "checkpoint", "output", "name")


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError if a microbatch cannot be split evenly over the mesh."""
    rows = config.data.batch_size // config.training.accumulation
    shares = batch_shares(mesh)
    if rows % shares:
        raise UserError(
            f"data.batch_size / training.accumulation is {rows} rows, which the {shares} devices along the mesh's "
            f"data and fsdp axes do not divide; choose a multiple of {shares}."
        )


def check_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        UserError: it has more tokens than the model, or the data was prepared with another one.
    """
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path {config.tokenizer.path} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size ({config.model.vocab_size})."
        )
    prepared_with = read_manifest(config.data.folder).tokenizer
    if prepared_with != tokenizer.fingerprint:
        raise UserError(
            f"data.folder {config.data.folder} was prepared with tokenizer {prepared_with[:12]}, and tokenizer.path "
            f"{config.tokenizer.path} is {tokenizer.fingerprint[:12]}; prepare the data again into another folder."
        )
    return tokenizer


def check_same_run(config: RunConfig) -> None:
    """Raises UserError if the run folder was begun with a configuration that gives another result."""
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return
    begun, wanted = to_dict(load(RunConfig, path)), to_dict(config)
    for section in wanted:
        if section not in _MAY_CHANGE and begun[section] != wanted[section]:
            key, old, new = _first_difference(section, begun[section], wanted[section])
            raise UserError(
                f"{config.output} holds a run with {key}={old}, and {new} is asked for; choose another output, or "
                "delete that folder to train again."
            )


def write_inputs(config: RunConfig) -> None:
    """Save the resolved configuration and a copy of the tokenizer, so that the run folder stands alone."""
    folder = Path(config.output)
    save(config, folder / CONFIG_FILE)
    partial = folder / f".{TOKENIZER_FILE}.tmp"
    shutil.copyfile(config.tokenizer.path, partial)
    os.replace(partial, folder / TOKENIZER_FILE)


def _first_difference(key: str, old: object, new: object) -> tuple[str, object, object]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:
            if old.get(name) != new[name]:
                return _first_difference(f"{key}.{name}", old.get(name), new[name])
    return key, old, new
