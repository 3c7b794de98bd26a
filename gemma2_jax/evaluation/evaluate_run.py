"""Evaluates a run on the validation split of its own data, as in the tables of studies and sweeps."""

from dataclasses import dataclass
from pathlib import Path

import jax

from gemma2_jax.checkpoints.store import (
    AVERAGED,
    CONFIG_FILE,
    PARAMS,
    checkpoint_steps,
    find_params,
    load_model_config,
)
from gemma2_jax.config import UserError, load_config, read_yaml
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.distill.teacher import open_teacher
from gemma2_jax.evaluation.evaluated_model import add_adapter, open_model
from gemma2_jax.evaluation.scores import build_scoring, score
from gemma2_jax.formats.load import load_params
from gemma2_jax.formats.recognise import ADAPTER_CONFIG, enclosing_run
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.language_modelling import MODEL
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.start import check_same_data
from gemma2_jax.training.validation import averages


@dataclass(frozen=True)
class Evaluation:
    """The results in one row of a study's table. Comparisons with a teacher are None without one.

    Attributes:
        parameters: parameter count of the model, its tied embedding counted once.
        tokens_seen: training tokens, padding included.
        cross_entropy: mean cross-entropy in nats.
        perplexity: exp of the cross-entropy.
        agreement: fraction of positions where the run and the teacher have the same most likely token.
        kl: mean KL(teacher || run) in nats.
        entropy: mean entropy of the run's distributions in nats.
        teacher_entropy: mean entropy of the teacher's distributions in nats.
    """

    parameters: int
    tokens_seen: int
    cross_entropy: float
    perplexity: float
    agreement: float | None
    kl: float | None
    entropy: float | None = None  # Older files lack this key and the next.
    teacher_entropy: float | None = None


def evaluate_run(
    run_folder: str | Path,
    teacher_folder: str | Path | None = None,
    adapter_folder: str | Path | None = None,
    averaged: bool = False,
) -> Evaluation:
    """Evaluates the newest checkpoint of a run on the validation split of its data, with the run's own settings.

    Args:
        teacher_folder: checkpoint of a teacher to compare with.
        adapter_folder: LoRA adapter to evaluate with the run's weights, a run folder or PEFT's folder.
        averaged: whether to evaluate the run's average of the weights (`training.ema`).

    Raises:
        UserError: `run_folder` is not a run folder, a folder holds no checkpoint, the data is not what the run was
            trained on, the teacher has another vocabulary or tokenizer, or the adapter was trained on another base
            model.
    """
    config = _config_of(Path(run_folder))
    check_same_data(run_folder, config.data)
    found = find_params(run_folder, AVERAGED if averaged else PARAMS)
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh), laid_out(config.layout):
        opened = open_model(str(run_folder), None, averaged)
        if adapter_folder is not None:
            opened = add_adapter(opened, str(adapter_folder))
        models = {MODEL: opened.load("float32", mesh, config.model)}
        tokenizer = opened.tokenizer
        if teacher_folder is not None:
            # In the precision of this run, whatever distill.dtype was in training.
            source, sizes = open_teacher(str(teacher_folder), config.model, tokenizer)
            models[TEACHER] = Gemma2(sizes, load_params(source, sizes, config.compute.dtype, mesh))
        scoring = build_scoring(config.compute, config.objective.block_tokens)
        batches = validation_batches(config.data, *feeding_share(mesh))
        sums = score(scoring, models, batches, tokenizer.byte_lengths(), mesh)
    metrics = averages({name: total for name, total in sums.items() if name not in ("bins", "bytes")})
    return Evaluation(
        parameters=count_parameters(config.model).total,
        tokens_seen=found.step * config.data.batch_size * config.data.seq_len,
        cross_entropy=metrics["cross_entropy"],
        perplexity=metrics["perplexity"],
        agreement=metrics.get("agreement"),
        kl=metrics.get("kl"),
        entropy=metrics["entropy"],
        teacher_entropy=metrics.get("teacher_entropy"),
    )


def _config_of(folder: Path) -> RunConfig:
    """Returns the configuration of a run. Raises UserError if the folder is not a run's."""
    file = folder / CONFIG_FILE
    if file.is_file() and set(read_yaml(file)) != {"model"}:
        return load_config(RunConfig, file)
    if checkpoint_steps(folder) and not file.exists():
        load_model_config(folder)  # raises
    wanted = (
        f"g2.evaluate_run needs a run folder of `gemma2 train`, whose {CONFIG_FILE} names the validation data"
    )
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; {wanted}.")
    found = "holds a converted model" if file.is_file() else f"has no {CONFIG_FILE}"
    if (run := enclosing_run(folder)) is not None:
        remedy = f"give {run}"
    elif (folder / ADAPTER_CONFIG).is_file():
        remedy = f"to measure this adapter, give its base model's run and adapter_folder={folder}"
    else:
        remedy = f"to evaluate a model on text: `gemma2 eval {folder} --text FILE`"
    raise UserError(f"{folder} {found}; {wanted}; {remedy}.")
