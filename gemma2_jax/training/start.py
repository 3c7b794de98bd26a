"""What is checked, and written into the run folder, before anything is computed."""

import json
from collections.abc import Iterator, Sequence
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
)
from gemma2_jax.config import UserError, load_config, read_json, read_yaml, save_config
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import tokenizer_of
from gemma2_jax.data.shards import MANIFEST, find_data_manifest, read_data_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.distill.teacher_record import TEACHER_FILE, TeacherRecord
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.formats.load import open_source
from gemma2_jax.formats.source import files_below
from gemma2_jax.model.vocabulary import check_tokens
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.processes.sharing import check_same_files
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import check_activations, laid_out
from gemma2_jax.training.metrics import JSON_LINES, read_metrics

DATA_FILE = "data.json"  # in a run folder: which documents and tokens it was trained on

# The files beside the checkpoints of a run, each of which a run that goes on needs.
_PURPOSES = {
    CONFIG_FILE: "which holds the configuration that the checkpoints beside it were trained with",
    DATA_FILE: "which identifies the data that the run was trained on",
    TOKENIZER_FILE: "the tokenizer that the run was trained with",
    TEACHER_FILE: "which identifies the teacher that the run was distilled from",
}


def as_prepared(config: RunConfig) -> RunConfig:
    """The run with the vocabulary of its prepared data, where the text supports no larger one.

    The model follows if it has as many tokens as were asked for.
    """
    manifest, asked = find_data_manifest(config.data.folder), config.tokenizer.vocab_size
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


def check_data(config: RunConfig) -> Tokenizer:
    """The run's tokenizer, after its data was found to be there and to fit.

    Raises:
        UserError: the tokenizer has another number of tokens than the model, or the data was prepared with another
            one or has no validation documents.
    """
    tokenizer = tokenizer_of(config.data, config.tokenizer)
    check_tokens(config.model, tokenizer.vocab_size, f"tokenizer.path {config.tokenizer.path}")
    manifest = read_data_manifest(config.data.folder)
    if not manifest.validation.documents:
        raise UserError(
            f"data.folder {config.data.folder} has no validation documents, which runs are evaluated on; prepare "
            "it with data.validation_fraction above 0."
        )
    return tokenizer


def check_run_folder(config: RunConfig) -> None:
    """Raises UserError if the run folder holds a part of a run only, or something else than a run of `train`.

    What is missing would otherwise be taken for a run that has not begun, or not be compared with what is asked for.
    """
    folder = Path(config.output)
    if not checkpoint_steps(folder):
        _check_no_checkpoints(folder)
        return
    if (folder / CONFIG_FILE).is_file() and set(read_yaml(folder / CONFIG_FILE)) == {"model"}:
        raise UserError(
            f"{folder} holds a converted model; choose another output, where initialise.source={folder} begins with "
            "its weights."
        )
    for name in _PURPOSES:
        if not (folder / name).is_file() and (name != TEACHER_FILE or config.distill.teaches):
            raise _missing(folder / name)
    find(folder, contents=False)


def _missing(path: Path) -> UserError:
    return UserError(
        f"{path} is missing, {_PURPOSES[path.name]}; copy it there from where the run was trained, or choose another "
        "output."
    )


def _check_no_checkpoints(folder: Path) -> None:
    """Raises UserError if a folder without checkpoints has lost them."""
    if (folder / FOLDER).is_dir() or not all((folder / name).is_file() for name in (CONFIG_FILE, JSON_LINES)):
        return
    begun, rows = load_config(RunConfig, folder / CONFIG_FILE), read_metrics(folder)
    last = max((row["step"] for row in rows), default=0)
    # A run that was stopped where its first checkpoint was due may not have written it.
    ended = any((row["step"], row["split"]) == (begun.training.steps, "validation") for row in rows)
    if last > begun.checkpoint.every or ended:
        raise UserError(
            f"{folder / FOLDER} is missing, though {folder / JSON_LINES} has rows up to step {last}; copy it there "
            f"from where the run was trained, or delete {folder} to train again."
        )


def check_same_data(run_folder: str | Path, data: DataConfig) -> None:
    """Raises UserError if `data.folder` holds other documents or tokens than the run was trained on."""
    path = Path(run_folder) / DATA_FILE
    if not path.exists():
        if checkpoint_steps(run_folder):
            raise _missing(path)
        return
    if read_json(path) != data_identity(data):
        raise UserError(
            f"{run_folder} was trained on other documents or with another tokenizer ({DATA_FILE}) than data.folder "
            f"{data.folder} holds now; choose another output, or delete that folder to train again."
        )


def names_other_teacher(config: RunConfig) -> bool:
    """Whether the run in the folder had its teacher or its cache elsewhere, or another one."""
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return False
    begun = load_config(RunConfig, path).distill
    return (begun.teacher, begun.cache) != (config.distill.teacher, config.distill.cache)


def data_identity(data: DataConfig) -> dict[str, str]:
    """What tells one prepared data set from another, wherever it lies."""
    manifest = read_data_manifest(data.folder)
    return {"documents": manifest.identity, "tokenizer": manifest.tokenizer}


def check_same_inputs(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if another process reads other weights or another cache from the paths that all are given.

    What the data was tokenised from, and by what, is in `data_identity`; a run folder is shared.
    """
    if jax.process_count() > 1:
        check_same_files(dict(_read_from(configs)))


def _read_from(configs: Sequence[RunConfig]) -> Iterator[tuple[str, list[Path]]]:
    for config in configs:
        sources = {"distill.teacher": config.distill.teacher}
        if latest_step(config.output) is None:
            sources["initialise.source"] = config.initialise.source
        for key, path in sources.items():
            if path is not None:
                yield f"{key} {path}", open_source(path).files
        if config.distill.cache is not None:
            yield f"distill.cache {config.distill.cache}", files_below([Path(config.distill.cache, MANIFEST)])


def write_inputs(config: RunConfig, record: TeacherRecord | None) -> None:
    """Saves the resolved configuration, a copy of the tokenizer, and the identity of data and teacher in the run
    folder."""
    folder = Path(config.output)
    save_config(config, folder / CONFIG_FILE)
    write_bytes(folder / TOKENIZER_FILE, Path(config.tokenizer.path).read_bytes())
    write_text(folder / DATA_FILE, json.dumps(data_identity(config.data)))
    if record is not None and config.distill.teaches:
        record.save(folder)
    # Where a text ends, and how a chat is written, the run learns from the model that it begins with or its teacher.
    origin = config.initialise.source or config.distill.teacher
    if origin is not None and latest_step(folder) is None:
        open_source(origin).metadata.save(folder)
