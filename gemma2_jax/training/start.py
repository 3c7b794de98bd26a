"""What is checked, and written into the run folder, before anything is computed."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE
from gemma2_jax.config import UserError, differences, load, save, to_dict
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import tokenizer_of
from gemma2_jax.data.shards import read_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.model.vocabulary import check_tokens
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.schedule import count_steps
from gemma2_jax.sharding.hosts import wait_for_all
from gemma2_jax.sharding.layout import check_activations, laid_out
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.taught_by import TaughtBy, read_taught_by

DATA_FILE = "data.json"  # in a run folder: which documents and tokens it was trained on

# What may differ between the configuration that a run began with and the one that goes on with it: where
# things lie and what watches them. That the data, the tokenizer and the teacher are the same is checked by content.
_MAY_CHANGE = {
    "name", "output", "hosts", "mesh", "layout", "distill.layout", "metrics", "checkpoint", "training.log_every",
    "training.profile_steps", "profile", "compilation_cache",
    "data.folder", "data.workers", "data.shard_characters", "tokenizer.path",
}  # fmt: skip


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
    for key, begun, value in changes(load(RunConfig, path), config):
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
    for key, one, other in differences(_in_steps(begun), _in_steps(asked)):
        if not any(f"{key}.".startswith(f"{name}.") for name in may_change):
            yield key, one, other


def _in_steps(config: RunConfig) -> dict[str, Any]:
    """The settings, each warm-up and decay as a number of steps: 0.1 and 50 are the same in a run of 500."""

    def counted(settings: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: counted(value, f"{where}.{name}") if isinstance(value, dict) else value
            for name, value in settings.items()
        }
        names = ("warmup_steps", "decay_steps")
        if set(names) <= set(found):
            warmup, decay = (found[name] for name in names)
            found |= zip(names, count_steps(where, warmup, decay, config.training.steps), strict=True)
        return found

    return counted(to_dict(config), "")


def older_schedule(config: RunConfig, step: int) -> str | None:
    """A line to say where the run's learning rates up to `step` are not those of its schedule, else None.

    Older versions were one step behind: no step had the final rate, and the first of a warm-up had 0.
    """
    if not (Path(config.output) / JSON_LINES).exists():
        return None
    rows = [row for row in read_metrics(config.output) if row["split"] == "train" and row["step"] <= step]
    if not rows:
        return None
    logged, done = rows[-1]["learning_rate"], rows[-1]["step"]
    rate = float(learning_rate_schedule(config.optimizer, config.training.steps)(done - 1))
    if math.isclose(logged, rate, rel_tol=1e-4):
        return None
    return (
        f"{config.name} was begun by an older version, whose schedule was a step behind: step {done} had the learning "
        f"rate {logged:.4g}, where it would now have {rate:.4g}. The steps from here on have today's."
    )


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
