"""The models of an evaluation: checkpoints of any kind, or adapters of one, opened before any weights are read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, load_config, read_yaml
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.config import UNQUANTISED, EvaluationConfig
from gemma2_jax.evaluation.record import EvaluatedCheckpoint
from gemma2_jax.formats.adapter import AdaptedSource, Adapter, read_adapter
from gemma2_jax.formats.based import check_base, settings_of_run
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.load import adapted, load_tokenizer, model_of, open_source
from gemma2_jax.formats.native import RunSource
from gemma2_jax.formats.source import WeightSource
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.model.quantised import WEIGHT_FORMATS, Format
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import check_activations
from gemma2_jax.training.start import check_same_data


@dataclass(frozen=True)
class EvaluatedModel:
    """An open checkpoint, perhaps with an adapter beside it.

    Attributes:
        name: its name in tables.
        path: the checkpoint, as given.
        format: format of its matrices; None for arrays.
        sliding_window: as in `EvaluationConfig`.
    """

    name: str
    path: str
    source: WeightSource
    tokenizer: Tokenizer
    averaged: bool = False
    adapter: Adapter | None = None
    format: Format | None = None
    sliding_window: int | Literal["checkpoint"] | None = "checkpoint"

    def load(self, dtype: Any, mesh: Mesh, padded_like: ModelConfig | None = None) -> Gemma2:
        """Loads the weights.

        Args:
            padded_like: config whose padding of the vocabulary the model gets; its own by default.

        Raises:
            UserError: the checkpoint is incomplete, the adapter has another base, or the mesh divides no weight.
        """
        config = self.source.config
        if padded_like is not None:
            config = replace(
                config, vocab_size=padded_like.vocab_size, vocab_padding=padded_like.vocab_padding
            )
        check_activations(mesh, dim_sizes(config))
        model = model_of(self.source, dtype, mesh, config, self.format)
        if self.adapter is not None:
            model = adapted(model, self.adapter, mesh)
        if self.sliding_window == "checkpoint":
            return model
        every = config.global_every if self.sliding_window else 1
        return Gemma2(replace(config, sliding_window=self.sliding_window, global_every=every), model.params())

    def describe(self) -> EvaluatedCheckpoint:
        """Identifies the checkpoint. Reads all weights once."""
        source = self.source
        whole = source if self.adapter is None else AdaptedSource(source, self.path, self.adapter)
        return EvaluatedCheckpoint(
            path=self.path,
            kind=source.kind,
            identity=source_identity(whole),
            step=source.step if isinstance(source, RunSource) else None,
            averaged=self.averaged,
            adapter=None if self.adapter is None else str(self.adapter.path),
            parameters=count_parameters(source.config).total,
            tokenizer=self.tokenizer.fingerprint,
            quantize=None if self.format is None else self.format.name,
            sliding_window=self.sliding_window,
        )


def open_models(checkpoints: Sequence[str], config: EvaluationConfig) -> list[EvaluatedModel]:
    """Opens the checkpoints, or the adapters of the one checkpoint; each in every format that `config.quantize` lists.

    Raises:
        UserError: one cannot be opened or has no tokenizer, an adapter has another base, or a name is given twice.
    """
    if not checkpoints:
        raise UserError("There is no checkpoint to evaluate; give at least one.")
    if config.adapters and len(checkpoints) > 1:
        raise UserError(
            f"evaluation.adapters belong to one checkpoint, but there are {len(checkpoints)}; an adapter's own folder "
            "is a checkpoint, too, and is evaluated with the base model that it names."
        )
    for path, count in Counter(str(Path(path)) for path in [*checkpoints, *config.adapters]).items():
        if count > 1:
            raise UserError(f"{path} is given {count} times; give it once.")
    of_run = config.averaged and not config.adapters
    opened = [open_model(path, config.tokenizer, of_run) for path in checkpoints]
    if config.adapters:
        opened = [add_adapter(opened[0], folder, config.averaged) for folder in config.adapters]
    shown = [_with_window(model, config.sliding_window) for model in opened]
    return [_in_format(model, name) for model in shown for name in config.quantize or (UNQUANTISED,)]


def _in_format(model: EvaluatedModel, name: str) -> EvaluatedModel:
    if name == UNQUANTISED:
        return model
    return replace(model, name=f"{model.name} in {name}", format=WEIGHT_FORMATS[name])


def _with_window(model: EvaluatedModel, window: int | Literal["checkpoint"] | None) -> EvaluatedModel:
    """The model with another window in its local layers, named in its row."""
    if window == "checkpoint":
        return model
    named = "without windows" if window is None else f"with windows of {window}"
    return replace(model, name=f"{model.name} {named}", sliding_window=window)


def open_model(path: str, tokenizer: str | None, averaged: bool = False) -> EvaluatedModel:
    """Opens one checkpoint; arguments and errors as in `open_source` and `load_tokenizer`."""
    source = open_source(path, tokenizer, averaged=averaged)
    source.check()
    return EvaluatedModel(path, path, source, load_tokenizer(source), averaged)


def add_adapter(model: EvaluatedModel, folder: str, averaged: bool = False) -> EvaluatedModel:
    """The model with the adapter in a folder, or the average of that over a run's steps (`training.ema`).

    Raises:
        UserError: there is no such adapter, or it was trained on another base model.
    """
    adapter = read_adapter(folder, model.source.config, averaged)
    check_base(adapter.path, adapter.identity, model.source)
    return replace(model, name=f"{model.path} + {folder}", adapter=adapter, averaged=averaged)


def open_teacher_of(models: Sequence[EvaluatedModel], config: EvaluationConfig) -> EvaluatedModel | None:
    """Opens the teacher, if there is one. Raises UserError if a model has another tokenizer."""
    if config.teacher is None:
        return None
    teacher = open_model(config.teacher, config.tokenizer)
    for model in models:
        if model.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
            raise UserError(
                f"{model.name} has the tokenizer {model.tokenizer.fingerprint[:12]} of {model.tokenizer.vocab_size} "
                f"tokens, but evaluation.teacher {config.teacher} has {teacher.tokenizer.fingerprint[:12]} of "
                f"{teacher.tokenizer.vocab_size} tokens; only models with the same tokenizer can be compared."
            )
    return teacher


def find_run_data(path: str) -> DataConfig | None:
    """The data that the run in a folder was trained on; None if the folder is no run folder with data."""
    folder = Path(path)
    if settings_of_run(folder) is None or "data" not in read_yaml(folder / CONFIG_FILE):
        return None
    return load_config(RunConfig, folder / CONFIG_FILE).data


def run_data_of(path: str) -> DataConfig:
    """The prepared data that the run in a folder was trained on.

    Raises:
        UserError: the folder is no run folder with data, or the data is not prepared or has changed.
    """
    data = find_run_data(path)
    if data is None:
        raise UserError(
            f"{path} has no validation data of its own, since it is not the folder of a training run; give "
            "evaluation.text or evaluation.data."
        )
    check_same_data(path, data)
    return data
