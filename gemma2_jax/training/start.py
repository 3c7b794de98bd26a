"""Checks of a run's folder and data, and the files written into the run folder, before training starts."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import (
    CONFIG_FILE,
    FOLDER,
    TOKENIZER_FILE,
    checkpoint_steps,
    find,
    latest_step,
    saved_method,
)
from gemma2_jax.config import UserError, differences, load_config, read_json, read_yaml, save_config, to_dict
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import tokenizer_of
from gemma2_jax.data.shards import MANIFEST, find_data_manifest, read_data_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.formats.base_record import BASE_FILE, BaseRecord, check_same_base
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.load import open_source
from gemma2_jax.formats.source import files_below
from gemma2_jax.machine import describe_machine
from gemma2_jax.messages import written
from gemma2_jax.methods.choose import method_class, own_name
from gemma2_jax.methods.method import ModelMethod
from gemma2_jax.model.vocabulary import check_tokens
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.processes.sharing import check_same_files
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import check_activations, laid_out
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.prerequisites import sources

DATA_FILE = (
    "data.json"  # in a run folder: identity of the documents and tokenizer that the run was trained on
)

MACHINE_FILE = "machine.txt"  # the machines that the run was trained on, one per line

_DATA_PURPOSE = "which identifies the data that the run was trained on"


def with_prepared_vocabulary(config: RunConfig) -> RunConfig:
    """Lowers the vocabulary size to that of the prepared data, if the text supports no larger one.

    The model's vocabulary is lowered too if it has tokenizer.vocab_size tokens.
    """
    manifest, requested = find_data_manifest(config.data.folder), config.tokenizer.vocab_size
    if (
        manifest is None
        or not manifest.vocabulary_full
        or requested is None
        or requested <= manifest.vocab_size
    ):
        return config
    model, tokens = config.model, manifest.vocab_size
    if model.num_tokens == requested:
        model = replace(model, vocab_size=tokens + model.vocab_padding)
    return replace(config, model=model, tokenizer=replace(config.tokenizer, vocab_size=tokens))


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError if a microbatch or the model's activations do not divide evenly over mesh and processes."""
    rows = config.data.batch_size // config.training.accumulation
    with laid_out(config.layout):
        check_activations(mesh, dim_sizes(config.model))
        check_rows(rows, config.data.seq_len, mesh, "data.batch_size / training.accumulation")


def check_data(config: RunConfig) -> Tokenizer:
    """Checks that the run's data exists and fits the model, and returns its tokenizer.

    Raises:
        UserError: the tokenizer has another number of tokens than the model, or the data was prepared with another
            tokenizer or has no validation documents.
    """
    tokenizer = tokenizer_of(config.data, config.tokenizer)
    check_tokens(config.model, tokenizer.vocab_size, f"tokenizer.path {config.tokenizer.path}")
    manifest = read_data_manifest(config.data.folder)
    if not manifest.validation.documents:
        raise UserError(
            f"data.folder {config.data.folder} has no validation documents, which runs need for evaluation; prepare "
            "it with data.validation_fraction above 0."
        )
    return tokenizer


def check_run_folder(config: RunConfig) -> None:
    """Raises UserError if the run folder holds an incomplete run, or something other than a run of `train`.

    Without this check, missing files could look like a run that has not started, or skip a check of the configuration.
    """
    folder = Path(config.output)
    if not checkpoint_steps(folder):
        _check_no_checkpoints(folder)
        return
    if (folder / CONFIG_FILE).is_file() and set(read_yaml(folder / CONFIG_FILE)) == {"model"}:
        raise UserError(
            f"output {folder} holds a converted model; choose another output, and write initialise.source={folder} to "
            "start from its weights."
        )
    for name, purpose in _needed_files(config).items():
        if not (folder / name).is_file():
            raise _missing(folder / name, purpose)
    find(folder, contents=False)


def _needed_files(config: RunConfig) -> dict[str, str]:
    """The files in a run folder that the run needs, next to its checkpoints, to be resumed, and what each is."""
    found = {
        CONFIG_FILE: "which holds the configuration that the checkpoints were trained with",
        DATA_FILE: _DATA_PURPOSE,
        TOKENIZER_FILE: "which is the tokenizer that the run was trained with",
    }
    record_file = method_class(config).record_file
    if record_file is not None:
        found[record_file.name] = record_file.purpose
    if config.adaptation.has_base:
        found[BASE_FILE] = "which identifies the base model that the run was trained on"
    return found


def check_built_from(method: ModelMethod, config: RunConfig) -> None:
    """Raises UserError if a method was built from another configuration, or for more tokens than the data supports."""
    for key, built, now in differences(to_dict(method.config), to_dict(config)):
        raise UserError(
            f"the method was built from a configuration with {key}={written(built)}, but the run has "
            f"{key}={written(now)}; build it from the run's, as in "
            f"g2.train(config, {type(method).__name__}(config))."
        )
    tokens = with_prepared_vocabulary(config).tokenizer.vocab_size
    if tokens != config.tokenizer.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size is {config.tokenizer.vocab_size}, but the text in data.folder "
            f"{config.data.folder} supports at most {tokens}; set it to {tokens} before you build the method."
        )


def check_same_method(config: RunConfig, method: ModelMethod | None) -> None:
    """Raises UserError if a run was begun with another method; None stands for the one that `config` selects."""
    now = own_name(config, method)
    begun = saved_method(config.output, now)
    if begun != now:
        one, other = (
            "the method that its configuration selects" if name is None else f"the method {name}"
            for name in (begun, now)
        )
        raise UserError(
            f"{config.output} was trained with {one}, but this run has {other}; give g2.train the same method, "
            f"choose another output, or delete {config.output} to train again."
        )


def _missing(path: Path, purpose: str) -> UserError:
    return UserError(
        f"{path} is missing, {purpose}; copy it there from where the run was trained, or choose another output."
    )


def _check_no_checkpoints(folder: Path) -> None:
    """Raises UserError if a folder without checkpoints must have had some."""
    if (folder / FOLDER).is_dir() or not all((folder / name).is_file() for name in (CONFIG_FILE, JSON_LINES)):
        return
    saved, rows = load_config(RunConfig, folder / CONFIG_FILE), read_metrics(folder)
    last = max((row["step"] for row in rows), default=0)
    # A run that was stopped at the step of its first checkpoint may not have written it.
    ended = any((row["step"], row["split"]) == (saved.training.steps, "validation") for row in rows)
    if last > saved.checkpoint.every or ended:
        raise UserError(
            f"{folder / FOLDER} is missing, but {folder / JSON_LINES} has rows up to step {last}; copy it there "
            f"from where the run was trained, or delete {folder} to train again."
        )


def check_same_data(run_folder: str | Path, data: DataConfig) -> None:
    """Raises UserError if `data.folder` holds documents or tokens other than those that the run was trained on."""
    path = Path(run_folder) / DATA_FILE
    if not path.exists():
        if checkpoint_steps(run_folder):
            raise _missing(path, _DATA_PURPOSE)
        return
    if read_json(path) != data_identity(data):
        raise UserError(
            f"{run_folder} was trained on other documents or with another tokenizer ({DATA_FILE}) than data.folder "
            f"{data.folder} has now; choose another output, or delete {run_folder} to train again."
        )


def is_changed(config: RunConfig, keys: Collection[str]) -> bool:
    """Whether one of these keys differs from the configuration saved in the run folder."""
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return False
    saved = to_dict(load_config(RunConfig, path))
    return any(key in keys for key, _, _ in differences(saved, to_dict(config)))


def checked_base(config: RunConfig) -> BaseRecord | None:
    """The record of a run's base model; None if all weights are trained. Reads all weights of the base.

    Raises:
        UserError: the run in the folder has another base.
    """
    if not config.adaptation.has_base:
        return None
    source = config.initialise.source
    assert source is not None
    base = BaseRecord(source, source_identity(open_source(source)))
    check_same_base(config.output, base)
    return base


def data_identity(data: DataConfig) -> dict[str, str]:
    """Fingerprints of the prepared documents and their tokenizer, independent of the folder's path."""
    manifest = read_data_manifest(data.folder)
    return {"documents": manifest.identity, "tokenizer": manifest.tokenizer}


def check_same_inputs(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if the weights or the cache at the configured paths differ between processes.

    Data and tokenizer are compared by `data_identity`, and the run folder is shared.
    """
    if jax.process_count() > 1:
        check_same_files(dict(_input_files(configs)))


def _input_files(configs: Sequence[RunConfig]) -> Iterator[tuple[str, list[Path]]]:
    for config in configs:
        for key, path in sources(config).items():
            is_cache = key == "distill.cache"
            files = files_below([Path(path, MANIFEST)]) if is_cache else open_source(path).files
            yield f"{key} {path}", files


def write_inputs(config: RunConfig, base: BaseRecord | None) -> None:
    """Writes configuration, tokenizer, machine, and the identities of data and base into the run folder."""
    folder = Path(config.output)
    save_config(config, folder / CONFIG_FILE)
    write_bytes(folder / TOKENIZER_FILE, Path(config.tokenizer.path).read_bytes())
    write_text(folder / DATA_FILE, json.dumps(data_identity(config.data)))
    _add_machine(folder / MACHINE_FILE)
    if base is not None:
        base.save(folder)
    # The end-of-text token and the chat format are those of the initial model, or else of the teacher.
    origin = config.initialise.source or config.distill.teacher
    if origin is not None and latest_step(folder) is None:
        metadata = open_source(origin).metadata
        if config.data.with_conversations:
            metadata = metadata.of_chats(Tokenizer.load(config.tokenizer.path).end_of_turn_id)
        metadata.save(folder)


def _add_machine(path: Path) -> None:
    """Adds the machine of this process to those that the run was trained on before."""
    machine = describe_machine(jax.devices())
    known = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    if machine not in known:
        write_text(path, "".join(f"{each}\n" for each in [*known, machine]))
