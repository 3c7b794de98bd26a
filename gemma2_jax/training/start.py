"""What is checked, and written into the run folder, before anything is computed."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE
from gemma2_jax.config import UserError, differences, load, save, to_dict
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import tokenizer_of
from gemma2_jax.data.shards import find_manifest, read_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.model.vocabulary import check_tokens
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.sharding.hosts import wait_for_all
from gemma2_jax.sharding.layout import check_activations, laid_out
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.taught_by import TaughtBy, read_taught_by

DATA_FILE = "data.json"  # in a run folder: which documents and tokens it was trained on

# What may differ between the configuration that a run began with and the one that goes on with it: where
# things lie and what watches them. That the data, the tokenizer and the teacher are the same is checked by content.
_MAY_CHANGE = {
    "name", "output", "hosts", "mesh", "layout", "distill.layout", "metrics", "checkpoint", "training.log_every",
    "training.eval_batches", "training.profile_steps", "profile", "compilation_cache",
    "data.folder", "data.workers", "data.shard_characters", "tokenizer.path",
}  # fmt: skip


def as_prepared(config: RunConfig) -> RunConfig:
    """The run with the vocabulary of its prepared data, where the text supports no larger one.

    The model follows if it has as many tokens as were asked for.
    """
    manifest, asked = find_manifest(config.data.folder), config.tokenizer.vocab_size
    if manifest is None or not manifest.vocabulary_full or asked is None or asked <= manifest.vocab_size:
        return config
    model, tokens = config.model, manifest.vocab_size
    if model.num_tokens == asked:
        model = replace(model, vocab_size=tokens + model.vocab_padding)
    return replace(config, model=model, tokenizer=replace(config.tokenizer, vocab_size=tokens))


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError if a microbatch or the model's activations cannot be split evenly over mesh and processes."""
    rows = config.data.batch_size // config.training.accumulation
    with laid_out(config.layout):
        check_activations(mesh, dim_sizes(config.model))
        check_rows(rows, config.data.seq_len, mesh, "data.batch_size / training.accumulation")


def check_shared(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if a run folder that process 0 has made is not there for this one."""
    wait_for_all("folders")
    for config in configs:
        if not Path(config.output).is_dir():
            raise UserError(
                f"output is {config.output}, which process 0 has made and process {jax.process_index()} does not see; "
                "it must lie on a disk that all processes share."
            )


def check_together(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if runs cannot be trained at once: by the same steps, on the same batches, and those of them
    that have a teacher of the same one."""
    _check_same(configs, _shared)
    _check_same([config for config in configs if config.distill.teaches], _teaching)
    outputs = [config.output for config in configs]
    for output in outputs:
        if outputs.count(output) > 1:
            raise UserError(f"output is {output} for two runs; each needs a folder of its own.")


def check_data(config: RunConfig) -> Tokenizer:
    """The run's tokenizer, after its data was found to be there and to fit.

    Raises:
        UserError: the tokenizer has another number of tokens than the model, or the data was prepared with another
            one or has no validation documents.
    """
    tokenizer = tokenizer_of(config.data, config.tokenizer)
    check_tokens(config.model, tokenizer.vocab_size, f"tokenizer.path {config.tokenizer.path}")
    manifest = read_manifest(config.data.folder)
    if not manifest.validation.documents:
        raise UserError(
            f"data.folder {config.data.folder} has no validation documents, which runs are evaluated on; prepare "
            "it with data.validation_fraction above 0."
        )
    return tokenizer


def check_same_run(config: RunConfig) -> None:
    """Raises UserError if the run folder was begun with a configuration that gives another result."""
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return
    for key, begun, value in changes(load(RunConfig, path), as_prepared(config)):
        raise UserError(
            f"{config.output} holds a run with {key}={begun}, and {value} is asked for; choose another "
            "output, or delete that folder to train again."
        )


def changes(begun: RunConfig, asked: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The dotted key and both values of all that makes `asked` another run than `begun`."""
    may_change = set(_MAY_CHANGE)
    taught_by = read_taught_by(asked.output)
    if taught_by is not None:  # which runs of before it was there have not
        may_change.add("distill.teacher")
        if taught_by.encoding is not None and asked.distill.cache is not None:
            may_change.add("distill.cache")
    for key, one, other in differences(to_dict(begun), to_dict(asked)):
        if not any(f"{key}.".startswith(f"{name}.") for name in may_change):
            yield key, one, other


def check_same_data(run_folder: str | Path, data: DataConfig) -> None:
    """Raises UserError if `data.folder` holds other documents or tokens than the run was trained on."""
    path = Path(run_folder) / DATA_FILE
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != data_identity(data):
        raise UserError(
            f"{run_folder} was trained on other documents or with another tokenizer ({DATA_FILE}) than data.folder "
            f"{data.folder} holds now; choose another output, or delete that folder to train again."
        )


def names_other_teacher(config: RunConfig) -> bool:
    """Whether the run in the folder had its teacher or its cache elsewhere, or another one."""
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return False
    begun = load(RunConfig, path).distill
    return (begun.teacher, begun.cache) != (config.distill.teacher, config.distill.cache)


def data_identity(data: DataConfig) -> dict[str, str]:
    """What tells one prepared data set from another, wherever it lies."""
    manifest = read_manifest(data.folder)
    return {"documents": manifest.identity, "tokenizer": manifest.tokenizer}


def write_inputs(config: RunConfig, taught_by: TaughtBy | None) -> None:
    """Save the resolved configuration, a copy of the tokenizer, the data's identity and who teaches in the run
    folder."""
    folder = Path(config.output)
    save(config, folder / CONFIG_FILE)
    write_bytes(folder / TOKENIZER_FILE, Path(config.tokenizer.path).read_bytes())
    write_text(folder / DATA_FILE, json.dumps(data_identity(config.data)))
    if taught_by is not None:
        taught_by.save(folder)


def _check_same(configs: Sequence[RunConfig], shared: Callable[[RunConfig], dict[str, Any]]) -> None:
    for config in configs[1:]:
        first = configs[0]
        for key, one, other in differences(shared(first), shared(config)):
            raise UserError(
                f"{first.name} has {key}={one}, and {config.name} has {other}; runs that are trained together share it."
            )


def _shared(config: RunConfig) -> dict[str, Any]:
    """What runs that are trained together have in common."""
    whole = to_dict(config)
    names = ("data", "tokenizer", "mesh", "layout", "compute", "profile", "compilation_cache")
    # When one logs, all clocks stand: the time of the others' evaluations and checkpoints is in no one's speed.
    in_training = ("steps", "log_every", *(("profile_steps",) if config.profile else ()))
    shared = {name: whole[name] for name in names}
    return {**shared, "training": {name: whole["training"][name] for name in in_training}}


def _teaching(config: RunConfig) -> dict[str, Any]:
    """What those of them that are taught have in common beside: all but what each makes of its teacher."""
    whole = to_dict(config)
    own = ("on_policy", "match")
    shared = {"distill": {name: value for name, value in whole["distill"].items() if name not in own}}
    # The teacher has the rows of the student's vocabulary, and a cache one temperature.
    shared["model"] = {name: whole["model"][name] for name in ("vocab_size", "vocab_padding")}
    if config.distill.cache is not None:
        shared["objective"] = {"temperature": whole["objective"]["temperature"]}
    return shared
