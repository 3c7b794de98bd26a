"""Loads a checkpoint of any kind into a model on devices, one weight of one layer at a time."""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError, suggest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import reason
from gemma2_jax.formats import hub
from gemma2_jax.formats.adapter import AdaptedSource, Adapter, base_of, has_base, read_adapter
from gemma2_jax.formats.based import BasedSource, settings_of_run
from gemma2_jax.formats.deepmind import DeepMindSource, is_orbax
from gemma2_jax.formats.gguf_header import is_gguf
from gemma2_jax.formats.gguf_source import GGUFSource
from gemma2_jax.formats.gguf_tokenizer import read_model
from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.formats.huggingface_config import CONFIG_FILE
from gemma2_jax.formats.native import RunSource
from gemma2_jax.formats.partial_run import PartialSource
from gemma2_jax.formats.reading_weights import put, read_onto_devices
from gemma2_jax.formats.recognise import describe, enclosing_run
from gemma2_jax.formats.source import DTYPES, WeightSource
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import with_adapter
from gemma2_jax.model.quantised import WEIGHT_FORMATS, Format, is_quantised
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.vocabulary import check_tokens, resize_rows, without_padding
from gemma2_jax.model.weights import Params, abstract_params, frozen_dtypes, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

_DEEPEST = 4  # folders above a file to search for its checkpoint
_PADDING = 1024  # rows; more than this and than a quarter of the tokens means another tokenizer, not padding


def open_source(
    path: str | Path,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    averaged: bool = False,
) -> WeightSource:
    """Opens a checkpoint of any kind, at `path` or with that name on the Hugging Face hub.

    An adapter, or a run of adaptation=partial, is opened together with its base model.

    Args:
        tokenizer: SentencePiece model file to use in place of the checkpoint's own.
        base: checkpoint of that base model, in place of the one that the folder names.
        averaged: whether to take a run's average of the weights (`training.ema`).

    Raises:
        UserError: there is no checkpoint, or none of a known kind; `tokenizer` is not a SentencePiece model; `base` is
            given and `path` is a complete model; or `averaged` is true and the checkpoint has no average.
    """
    if tokenizer is not None:
        Tokenizer.load(tokenizer)  # refuses a bad file before gigabytes are downloaded
    folder = Path(path)
    if hub.is_remote(str(path)):
        folder = hub.download(str(path))
    try:
        if averaged and settings_of_run(folder) is None:
            raise UserError(
                f"{path} is not a run folder, and only a run keeps an average of its weights; leave out --averaged."
            )
        source = (
            _open_on_base(folder, base, tokenizer, averaged)
            if has_base(folder)
            else _open_model(folder, str(path), averaged)
        )
        if base is not None and not isinstance(source, BasedSource):
            raise UserError(
                f"{path} is a complete model, so it has no use for the base model {base}; leave it out."
            )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    if tokenizer is not None:
        source.tokenizer = Path(tokenizer)
    if not isinstance(source, BasedSource):
        _find_padding(source)
    return source


def _open_model(folder: Path, name: str, averaged: bool) -> WeightSource:
    reader = _reader_of(folder)
    if reader is None:
        raise UserError(f"{name} {_describe(folder)}.")
    return RunSource(folder, averaged) if averaged else reader(folder)


def _open_on_base(
    folder: Path, base: str | Path | None, tokenizer: str | Path | None, averaged: bool
) -> BasedSource:
    of, own = str(base_of(folder) if base is None else base), folder / store.TOKENIZER_FILE
    settings = settings_of_run(folder)
    is_partial = settings is not None and not settings.is_adapter
    try:
        source = open_source(of, own if tokenizer is None and own.exists() else tokenizer)
    except UserError as error:
        if base is not None:
            raise
        convert = f"gemma2 convert {folder} TARGET {'' if is_partial else '--merge '}--base BASE"
        generate = f"gemma2 generate --checkpoint BASE --adapter {folder}, or "
        raise UserError(
            f"{folder} was trained on the base model {of}: {str(error).removesuffix('.')}; if it was moved, name its "
            f"place, as in {'' if is_partial else generate}{convert}."
        ) from None
    if settings is not None and is_partial:
        return PartialSource(source, of, folder, settings, averaged)
    return AdaptedSource(source, of, read_adapter(folder, source.config, averaged))


def _reader_of(folder: Path) -> Callable[[Path], WeightSource] | None:
    if is_gguf(folder):
        return GGUFSource
    is_run = (folder / store.CONFIG_FILE).exists()
    if is_run and (folder / store.FOLDER).exists():  # other tools have a config.yaml too
        return RunSource
    if (folder / CONFIG_FILE).exists():
        return HuggingFaceSource
    if is_orbax(folder) and enclosing_run(folder) is None:
        return DeepMindSource
    # For an incomplete run folder, RunSource reports what is missing.
    return RunSource if is_run or store.checkpoint_steps(folder) else None


def _describe(path: Path) -> str:
    """Returns what a path without a readable checkpoint holds, and what is accepted."""
    if path.is_dir():
        inside = next(
            (inner for inner in sorted(path.iterdir()) if inner.is_dir() and _reader_of(inner)), None
        )
        if inside is not None:
            return f"is not a checkpoint, but {inside} in it is"
    found = describe(path)
    if found is None and path.is_file():  # an unknown name, but perhaps inside a checkpoint
        around = next((folder for folder in path.absolute().parents[:_DEEPEST] if _reader_of(folder)), None)
        if around is not None:
            return f"is one file of a checkpoint; give its folder, {around}"
    if found is not None and ";" in found:
        return found
    unknown = "is a file of unknown type" if path.is_file() else "holds no checkpoint of a known kind"
    return (
        f"{found or unknown}; accepted: a run folder, a Hugging Face folder with config.json "
        "and *.safetensors or its name on the hub, PEFT's folder of a LoRA adapter, DeepMind's Orbax checkpoint, and a "
        "GGUF file"
    )


def _find_padding(source: WeightSource) -> None:
    """Treats embedding rows beyond the tokenizer's tokens as padding, unless a file names tokens for them.

    Embeddings are padded to a round number of rows, and config.json does not contain the number of padding rows.
    """
    if source.tokenizer is None or isinstance(source, RunSource):  # a run's config gives the padding
        return
    try:
        tokens = Tokenizer(read_model(source.tokenizer), str(source.tokenizer)).vocab_size
    except UserError:  # raised again where a tokenizer is needed
        return
    padding = source.config.vocab_size - tokens
    if 0 <= padding <= max(_PADDING, tokens // 4) and not (padding and source.added_tokens(tokens)):
        source.config = replace(source.config, vocab_padding=padding)


def load(
    path: str | Path,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    tokenizer: str | Path | None = None,
    averaged: bool = False,
    quantize: str | None = None,
) -> tuple[Gemma2, Tokenizer]:
    """Loads the model and the tokenizer of a checkpoint of any kind.

    Args:
        path: folder of the checkpoint, or its name on the Hugging Face hub.
        dtype: dtype that the weights are converted to, one of `DTYPES`.
        mesh: mesh to place the weights on; by default only the first device of this process.
        tokenizer: SentencePiece model file, for a checkpoint without one.
        averaged: whether to take a run's average of the weights (`training.ema`).
        quantize: format that all matrices are held in, int8 or int4; a model with them cannot be trained.

    Raises:
        UserError: the checkpoint is incomplete, is not a Gemma 2, or has no matching tokenizer.
    """
    if not _is_accepted(dtype):
        raise UserError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}.")
    format_ = weight_format(quantize, "quantize")
    source = open_source(path, tokenizer, averaged=averaged)
    found = load_tokenizer(source)
    return model_of(source, dtype, mesh, format_=format_), found


def weight_format(name: str | None, key: str) -> Format | None:
    """The format of a whole model with this name; None without one. Raises UserError if there is none of that name."""
    if name is None:
        return None
    if name not in WEIGHT_FORMATS:
        raise UserError(f"{key} is {name!r}, {suggest(name, WEIGHT_FORMATS)}.")
    return WEIGHT_FORMATS[name]


def model_of(
    source: WeightSource,
    dtype: Any,
    mesh: Mesh | None = None,
    config: ModelConfig | None = None,
    format_: Format | None = None,
) -> Gemma2:
    """Loads the model of an open checkpoint; arguments and errors as in `load_params`.

    An adapter stays beside the weights of its base model, as in training.

    Args:
        config: the source's own by default.
        format_: format of all matrices, except those of an adapter; None for arrays of `dtype`.
    """
    config = source.config if config is None else config
    if isinstance(source, AdaptedSource):
        source.check_base()
        return adapted(model_of(source.base, dtype, mesh, config, format_), source.adapter, mesh)
    if format_ is not None:
        dtype = frozen_dtypes(weight_specs(config), dtype, format_, whole=True)
    return Gemma2(config, load_params(source, config, dtype, mesh))


def adapted(model: Gemma2, adapter: Adapter, mesh: Mesh | None = None) -> Gemma2:
    """The model with an adapter beside its weights, which are shared and not copied; `mesh` as in `load`."""
    mesh = build_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    specs, arrays = adapter.stacked(model.config)
    targets = abstract_params(specs, mesh=mesh)
    placed = jax.tree.map(lambda leaf, array: put(array, leaf.sharding), targets, arrays)
    return Gemma2(model.config, with_adapter(model.params(), placed, adapter.settings.scale))


def _is_accepted(dtype: Any) -> bool:
    try:
        return np.dtype(dtype).name in DTYPES
    except (TypeError, ValueError):
        return False


def load_tokenizer(source: WeightSource) -> Tokenizer:
    """Returns the checkpoint's tokenizer, with its stop ids. Raises UserError if there is none that matches."""
    path = source.tokenizer
    if path is None:
        other = source.path / "tokenizer.json"  # the only tokenizer file that transformers 5 saves
        hint = "; its tokenizer.json is not enough" if other.exists() else ""
        raise UserError(
            f"{source.path} has no tokenizer.model, the SentencePiece file of Gemma's tokenizer{hint}; put it there, "
            "or give it to `gemma2 convert`, `eval`, `generate` or `merge` as --tokenizer FILE."
        )
    tokenizer = Tokenizer(read_model(path), str(path), source.metadata.stop_ids)
    if isinstance(source, RunSource):
        check_tokens(source.config, tokenizer.vocab_size, str(path))
    elif tokenizer.vocab_size != source.config.num_tokens:
        raise UserError(_mismatch(source, path, tokenizer.vocab_size))
    return tokenizer


def _mismatch(source: WeightSource, path: Path, tokens: int) -> str:
    """Returns why a tokenizer does not match the embedding of another tool's checkpoint."""
    rows = source.config.vocab_size
    added = source.added_tokens(tokens)
    if not added:
        return (
            f"{path} has {tokens} tokens, but the embedding in {source.path} has {rows} rows; it belongs to another "
            "model."
        )
    named = ", ".join(f"{name!r} ({number})" for number, name in list(added.items())[:3])
    more = f" and {len(added) - 3} more" if len(added) > 3 else ""
    return (
        f"{source.path} adds tokens to the {tokens} of {path}: {named}{more}; give `gemma2 convert` a tokenizer.model "
        "that has them as --tokenizer FILE, or remove them from the model (in transformers, "
        f"resize_token_embeddings({tokens}))."
    )


def open_for(tokenizer: Tokenizer, path: str | Path, key: str) -> WeightSource:
    """Opens the checkpoint at `path`, the value of config key `key`, for a run with this tokenizer.

    Raises:
        UserError: as `open_source`, or the checkpoint has another tokenizer.
    """
    source = open_source(path)
    found = load_tokenizer(source)
    if found.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key} {path} has the tokenizer {found.fingerprint[:12]} of {found.vocab_size} tokens, but "
            f"tokenizer.path is {tokenizer.fingerprint[:12]} of {tokenizer.vocab_size} tokens; they must be the same."
        )
    return source


def check_readable(key: str, path: str | Path, tokenizer: str | Path) -> None:
    """Raises UserError if a run cannot read the checkpoint at `path`, the value of config key `key`.

    It may be missing, of unknown kind or incomplete, or have another tokenizer. The last is checked only if the file
    `tokenizer` exists; otherwise the tokenizer is yet to be trained.
    """
    try:
        open_source(path).check()
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if Path(tokenizer).is_file():
        open_for(Tokenizer.load(tokenizer), path, key)


def load_params(
    source: WeightSource,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """Returns the parameters of a checkpoint, structured like `weight_specs(config)`.

    A host holds the parameters of its own devices, and one tensor of the file at a time.

    Args:
        config: the model's config; it may differ from the source's only in vocabulary padding, which is truncated or
            filled with zeros.
        dtype: dtype of the parameters, one of `DTYPES`, or a nested dict of them, laid out like the parameters. A
            `Format` in place of a dtype quantises a weight, on the devices, one layer at a time.
        mesh: as in `load`.
        progress: called with the number of weights read and the total number.

    Raises:
        UserError: the checkpoint is incomplete, belongs to another model, or has weights beyond the dtype's range.
    """
    source.check()
    _check_same_model(source, config)
    if source.note is not None:
        print(f"gemma2: {source.note}.", file=sys.stderr, flush=True)
    if mesh is None:
        mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
    target = abstract_params(weight_specs(source.config), dtype, mesh)
    is_dense = not any(map(is_quantised, jax.tree.leaves(target, is_leaf=is_quantised)))
    if isinstance(source, RunSource) and source.quantize is None and is_dense:
        params = store.restore_params(source.path, target, source.tree)  # Orbax reads each device's part
    else:
        params = read_onto_devices(source, target, progress)
    params, _ = resize_rows(params, source.config, config.vocab_size)
    return params


def _check_same_model(source: WeightSource, config: ModelConfig) -> None:
    ours, theirs = without_padding(config), without_padding(source.config)
    for field in fields(ModelConfig):
        expected, found = getattr(ours, field.name), getattr(theirs, field.name)
        if expected != found:
            if field.name == "vocab_size":
                raise UserError(
                    f"{source.path} holds a model with {found} tokens, but the configuration has {expected}."
                )
            raise UserError(
                f"{source.path} holds a model with {field.name} {found}, but the configuration has {expected}."
            )
