"""From a checkpoint of any kind to a model on devices, one weight of one layer at a time."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import reason
from gemma2_jax.formats import hub
from gemma2_jax.formats.deepmind import DeepMindSource, is_orbax
from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.formats.huggingface_config import CONFIG_FILE
from gemma2_jax.formats.recognise import ADAPTER_CONFIG, describe, run_around
from gemma2_jax.formats.run import RunSource
from gemma2_jax.formats.source import DTYPES, Source, all_places
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.narrowing import check_range
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.vocabulary import check_tokens, resize_rows, without_padding
from gemma2_jax.model.weights import Params, abstract_params, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

_DEEPEST = 4  # folders between a file and the folder of its checkpoint, itself included
_PADDING = 1024  # rows, or a quarter of the tokens: more of them are those of another tokenizer


def open_source(path: str | Path, tokenizer: str | Path | None = None) -> Source:
    """The checkpoint at `path`, or of that name on the Hugging Face hub, whatever kind it is of.

    Args:
        tokenizer: a SentencePiece model file, in the place of the checkpoint's own.

    Raises:
        UserError: there is none, or none of a known kind; or `tokenizer` is no such file.
    """
    if tokenizer is not None:
        Tokenizer.load(tokenizer)  # refuses a bad one before gigabytes are fetched
    folder = Path(path)
    if hub.is_elsewhere(str(path)):
        folder = hub.download(str(path))
    try:
        reader = _reader_of(folder)
        if reader is None:
            raise UserError(f"{path} {_what_is(folder)}.")
        source = reader(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    if tokenizer is not None:
        source.tokenizer = Path(tokenizer)
    _find_padding(source)
    return source


def _reader_of(folder: Path) -> Callable[[Path], Source] | None:
    is_run = (folder / store.CONFIG_FILE).exists()
    if is_run and (folder / store.FOLDER).exists():  # other tools have a config.yaml too
        return RunSource
    if (folder / CONFIG_FILE).exists():
        return HuggingFaceSource
    if is_orbax(folder) and run_around(folder) is None:
        return DeepMindSource
    # Of a run folder that is not whole, it tells what is missing.
    return RunSource if is_run or store.checkpoint_steps(folder) else None


def _what_is(path: Path) -> str:
    if path.is_dir() and not (path / ADAPTER_CONFIG).exists():
        inside = next(
            (inner for inner in sorted(path.iterdir()) if inner.is_dir() and _reader_of(inner)), None
        )
        if inside is not None:
            return f"holds no checkpoint that is known, but {inside} does"
    found = describe(path)
    if found is None and path.is_file():  # of no known name, but perhaps in a known place
        around = next((folder for folder in path.absolute().parents[:_DEEPEST] if _reader_of(folder)), None)
        if around is not None:
            return f"is one file of a checkpoint; give its folder, {around}"
    if found is not None and ";" in found:
        return found
    unknown = "is a file of no known kind" if path.is_file() else "holds no checkpoint that is known"
    return (
        f"{found or unknown}; accepted: a run folder, a Hugging Face folder with config.json "
        "and *.safetensors or its name on the hub, and DeepMind's Orbax checkpoint (`gemma2 inspect` takes GGUF too)"
    )


def _find_padding(source: Source) -> None:
    """Takes rows of the embedding behind those of the tokenizer's tokens for padding, if nothing names them.

    Embeddings are filled up to a round number of rows, and a config.json does not tell how many of them are used.
    """
    if source.tokenizer is None or isinstance(source, RunSource):  # whose configuration tells
        return
    try:
        tokens = Tokenizer.load(source.tokenizer).vocab_size
    except UserError:  # is told where a tokenizer is needed
        return
    padding = source.config.vocab_size - tokens
    if 0 <= padding <= max(_PADDING, tokens // 4) and not (padding and source.added_tokens(tokens)):
        source.config = replace(source.config, vocab_padding=padding)


def load(
    path: str | Path,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Gemma2, Tokenizer]:
    """The model and the tokenizer of a checkpoint of any kind.

    Args:
        path: its folder, or its name on the Hugging Face hub.
        dtype: that the weights are converted to, one of `DTYPES`.
        mesh: that they are laid out on; by default the first device of this process alone.
        tokenizer: a SentencePiece model file, for a checkpoint without one.

    Raises:
        UserError: the checkpoint is not whole, is no Gemma 2, or has no fitting tokenizer.
    """
    if not _is_accepted(dtype):
        raise UserError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}.")
    source = open_source(path, tokenizer)
    found = load_tokenizer(source)
    return load_model(source, dtype, mesh), found


def load_model(source: Source, dtype: Any, mesh: Mesh | None = None) -> Gemma2:
    """The model of a checkpoint that is open; arguments and errors as in `load_params`."""
    return Gemma2(source.config, load_params(source, source.config, dtype, mesh))


def _is_accepted(dtype: Any) -> bool:
    try:
        return np.dtype(dtype).name in DTYPES
    except (TypeError, ValueError):
        return False


def load_tokenizer(source: Source) -> Tokenizer:
    """The checkpoint's tokenizer, which knows where its texts end. Raises UserError if it has none that fits."""
    path = source.tokenizer
    if path is None:
        other = source.path / "tokenizer.json"  # all that transformers 5 saves
        seen = "; its tokenizer.json is not enough" if other.exists() else ""
        raise UserError(
            f"{source.path} has no tokenizer.model, the SentencePiece file of Gemma's tokenizer{seen}; put it there, "
            "or name it as --tokenizer FILE to `gemma2 convert` or `gemma2 generate`."
        )
    tokenizer = Tokenizer.load(path, source.metadata.stop_ids)
    if isinstance(source, RunSource):
        check_tokens(source.config, tokenizer.vocab_size, str(path))
    elif tokenizer.vocab_size != source.config.num_tokens:
        raise UserError(_misfit(source, path, tokenizer.vocab_size))
    return tokenizer


def _misfit(source: Source, path: Path, tokens: int) -> str:
    """How a tokenizer does not fit the embedding of a checkpoint of another tool's."""
    rows = source.config.vocab_size
    added = source.added_tokens(tokens)
    if not added:
        return f"{path} has {tokens} tokens and the embedding in {source.path} {rows} rows; it is another model's."
    named = ", ".join(f"{name!r} ({number})" for number, name in list(added.items())[:3])
    more = f" and {len(added) - 3} more" if len(added) > 3 else ""
    return (
        f"{source.path} adds tokens to the {tokens} of {path}: {named}{more}; name a tokenizer.model that has them to "
        f"convert as --tokenizer FILE, or take them out of it (in transformers, resize_token_embeddings({tokens}))."
    )


def open_for(tokenizer: Tokenizer, path: str | Path, key: str) -> Source:
    """The checkpoint at `path`, which the setting `key` names, for a run with this tokenizer.

    Raises:
        UserError: as `open_source`, or the checkpoint has another tokenizer.
    """
    source = open_source(path)
    theirs = load_tokenizer(source)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key} {path} has the tokenizer {theirs.fingerprint[:12]} of {theirs.vocab_size} tokens, and "
            f"tokenizer.path is {tokenizer.fingerprint[:12]} of {tokenizer.vocab_size}; both must be the same."
        )
    return source


def check_readable(key: str, path: str | Path, tokenizer: str | Path) -> None:
    """Raises UserError if the checkpoint at `path`, which the setting `key` names, cannot be read by a run.

    It is missing, of no known kind or not whole; or has another tokenizer, where the file `tokenizer` is there: else
    that is trained with the data.
    """
    try:
        open_source(path).check()
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if Path(tokenizer).is_file():
        open_for(Tokenizer.load(tokenizer), path, key)


def load_params(
    source: Source,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """The parameters of a checkpoint, laid out like `weight_specs(config)`, for a model of this configuration.

    A host holds what its own devices get and one tensor of the file at a time.

    Args:
        config: the source's own, but for padding of the vocabulary, which is cut or filled with zeros.
        dtype, mesh: as in `load`.
        progress: told how many weights are read, and of how many.

    Raises:
        UserError: the checkpoint is not whole, of another model, or has weights beyond what the dtype can hold.
    """
    source.check()
    _check_same_model(source, config)
    if mesh is None:
        mesh = build_mesh(MeshConfig(), jax.local_devices()[:1])
    target = abstract_params(weight_specs(source.config), dtype, mesh)
    if isinstance(source, RunSource):
        params = store.load_params(source.path, target)  # Orbax reads each device's part
    else:
        params = _load_weights(source, target, progress)
    params, _ = resize_rows(params, source.config, config.vocab_size)
    return params


def _load_weights(source: Source, target: Any, progress: Callable[[int, int], None]) -> Params:
    params: Params = {}
    places = list(all_places(weight_specs(source.config)))
    for done, place in enumerate(places, 1):
        leaf, branch, name = _find(target, params, place.path)
        part = source.weight(place)
        check_range(part, leaf.dtype, f"{source.path}: {place.path}")
        if place.pair is None:
            branch[name] = _converter(leaf.dtype, leaf.sharding)(_put(part, leaf.sharding))
        else:
            if name not in branch:
                branch[name] = _zeros(leaf)
            sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            branch[name] = _setter(leaf.sharding)(branch[name], _put(part, sharding), place.pair)
        progress(done, len(places))
    return params


def _check_same_model(source: Source, config: ModelConfig) -> None:
    ours, theirs = without_padding(config), without_padding(source.config)
    for field in fields(ModelConfig):
        wanted, found = getattr(ours, field.name), getattr(theirs, field.name)
        if wanted != found:
            if field.name == "vocab_size":
                raise UserError(
                    f"{source.path} holds a model of {found} tokens, and the configuration's has {wanted}."
                )
            raise UserError(
                f"{source.path} holds a model of {field.name} {found}, and the configuration's has {wanted}."
            )


def _find(target: Any, params: Params, path: str) -> tuple[Any, Params, str]:
    """The leaf of `target` at `path`, and where to put it in `params`, made if it is not there yet."""
    *above, name = path.split("/")
    for key in above:
        target, params = target[key], params.setdefault(key, {})
    return target[name], params, name


def _put(part: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host's array on devices; each process gives its own devices their parts."""
    return jax.make_array_from_callback(part.shape, sharding, lambda index: np.ascontiguousarray(part[index]))


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


@cache
def _converter(dtype: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


@cache
def _setter(sharding: NamedSharding) -> Any:
    """Writes one pair's weight into a stack, in place."""

    def write(stack: jax.Array, part: jax.Array, pair: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), pair, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
