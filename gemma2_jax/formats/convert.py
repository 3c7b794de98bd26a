"""Converts between kinds of checkpoints: writes beside the target, reads back and compares, then renames."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import reason, replacing, sole_writer, write_text
from gemma2_jax.formats import gguf, huggingface, peft
from gemma2_jax.formats.adapter import AdaptedSource
from gemma2_jax.formats.gguf_encodings import CALIBRATED, QUANTISED, Blocks
from gemma2_jax.formats.gguf_tokenizer import read_model
from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.formats.huggingface_config import CONFIG_FILE, config_json
from gemma2_jax.formats.layouts import EMBEDDING, GGUF, HUGGINGFACE, Entry, WeightPlace, expand
from gemma2_jax.formats.litert import LiteRTFile, LiteRTSettings, check_extra, template_note
from gemma2_jax.formats.load import load_params, load_tokenizer, open_source
from gemma2_jax.formats.metadata import GENERATION_FILE
from gemma2_jax.formats.modelfile import Modelfile
from gemma2_jax.formats.native import RunSource, write_run
from gemma2_jax.formats.source import DTYPES, WeightSource, all_places, row_blocks
from gemma2_jax.formats.tokenizer_files import write_tokenizer_files
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.narrowing import check_range
from gemma2_jax.model.vocabulary import without_padding
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

KINDS = ("run", "huggingface", "gguf", "litert", "peft")
SHARD_BYTES = 2 * 10**9  # bytes of a safetensors shard

_SUFFIXES = {".gguf": "gguf", ".litertlm": "litert"}
_ENCODINGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # GGUF's names

Progress = Callable[[str, int, int], None]  # called with the stage, the number of items done, and their total
Calibrate = Callable[[WeightSource], gguf.Importance]  # measures the importance of inputs on data


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: kinds of source and target, dtypes, and the number of weights compared.

    Attributes:
        notes: what else to know about the result, one clause each.
    """

    source: str
    target: str
    dtype: str
    source_dtypes: tuple[str, ...]
    weights: int
    notes: tuple[str, ...] = ()


def convert(
    source_path: str | Path,
    target_path: str | Path,
    kind: str | None = None,
    dtype: str | None = None,
    tokenizer_path: str | Path | None = None,
    merge: bool = False,
    base: str | Path | None = None,
    averaged: bool = False,
    calibrate: Calibrate | None = None,
    litert: LiteRTSettings | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Conversion:
    """Writes the checkpoint at `source_path` as another kind at `target_path`, and verifies the result.

    Args:
        source_path: checkpoint of any kind that `open_source` accepts.
        target_path: path that must not exist yet; it appears only once everything is written and compared.
        kind: one of KINDS; `peft` for an adapter alone. By default a target that ends in `.gguf` or `.litertlm` becomes
            such a file, one of our runs becomes a Hugging Face folder, and anything else becomes a run folder.
        dtype: one of DTYPES, or of QUANTISED for GGUF; by default the source's dtype. A LiteRT-LM file has none: its
            weights are float32, or in the format of its settings.
        tokenizer_path: SentencePiece model file, for a source without one.
        merge: whether to write the complete model W + s A B of an adapter and its base. Without it, an adapter can
            only become PEFT's.
        base: checkpoint of an adapter's base model, in place of the one that the adapter names.
        averaged: whether to take a run's average of the weights (`training.ema`).
        calibrate: for the dtypes `CALIBRATED`, such as `evaluation.calibration.Calibration(DATA)`.
        litert: settings of a LiteRT-LM file, the defaults if None.

    Raises:
        UserError: an argument is invalid (raised before anything is downloaded); the source is incomplete; the target
            exists or cannot be written; or the written weights read back differently.
    """
    target = Path(target_path)
    kind = check_arguments(target, kind, dtype, tokenizer_path)
    if litert is not None and kind != "litert":
        raise UserError(
            f"--quantize, --prefill and --context belong to a LiteRT-LM file, which {target} is not; leave them out, "
            "or choose a target that ends in .litertlm."
        )
    if calibrate is not None and dtype not in CALIBRATED:
        raise UserError(
            f"--calibrate chooses the grids of {', '.join(CALIBRATED)}, but the dtype is "
            f"{dtype or 'that of the source'}; leave it out, or add --dtype q4_k_m."
        )

    def open_it() -> WeightSource:
        source = open_source(source_path, tokenizer_path, base, averaged)
        _check_adapter(source, kind, merge)
        return source

    return write_checkpoint(open_it, target, kind, dtype, progress, calibrate, litert)


def write_checkpoint(
    open_it: Callable[[], WeightSource],
    target: Path,
    kind: str | None,
    dtype: str | None,
    progress: Progress,
    calibrate: Calibrate | None = None,
    litert: LiteRTSettings | None = None,
) -> Conversion:
    """Writes the checkpoint that `open_it` returns; other arguments and errors as in `convert`."""
    try:
        with sole_writer(target), replacing(target) as temporary:
            if target.exists() or target.is_symlink():
                raise UserError(f"{target} exists already; choose another target, or delete it.")
            temporary.touch()  # fails before gigabytes are read if the target cannot be written
            temporary.unlink()
            source = open_it()
            source.check()
            if isinstance(source, AdaptedSource) and kind == "peft":
                return _write_peft(source, temporary, dtype or "float32")
            tokenizer = load_tokenizer(source)
            is_ours = isinstance(source, RunSource) or (source.path / store.CONFIG_FILE).exists()
            kind = kind or ("huggingface" if is_ours else "run")
            dtype = dtype or source.dtype
            notes: tuple[str, ...] = ()
            if source.note is not None and kind != "run":  # for a run, `load_params` prints it
                notes = (source.note,)
            if kind == "run":
                _write_run(source, temporary, dtype, progress)
                _compare(source, RunSource(temporary), dtype, progress)
            elif kind == "huggingface":
                _write_huggingface(source, temporary, dtype, tokenizer, progress)
                _compare(source, HuggingFaceSource(temporary), dtype, progress)
            elif kind == "litert":
                settings = litert or LiteRTSettings()
                dtype = settings.quantize or "float32"
                notes += _write_litert(source, temporary, settings, progress)
            else:
                beside = Modelfile.of(target, tokenizer, source.metadata)
                if beside is not None:
                    beside.check()
                importance = gguf.NO_IMPORTANCE if calibrate is None else calibrate(source)
                notes += _write_gguf(source, temporary, dtype, target.stem, importance, progress)
        if kind == "gguf" and beside is not None:
            write_text(beside.path, beside.content)
            notes += (f"{beside.path} describes it for Ollama",)
    except BlockingIOError:
        raise UserError(f"{target} is being written by another process; choose another target.") from None
    except BrokenPipeError:  # from printing progress, not from writing the target
        raise
    except OSError as error:
        raise UserError(f"{target} cannot be written: {reason(error, target)}.") from None
    weights = sum(1 for _ in all_places(weight_specs(source.config)))
    return Conversion(source.kind, kind, dtype, source.dtypes, weights, notes)


def _check_adapter(source: WeightSource, kind: str | None, merge: bool) -> None:
    """Raises UserError if only one of the source and the target is an adapter."""
    if not isinstance(source, AdaptedSource):
        if kind == "peft":
            raise UserError(f"{source.path} is a complete model, which cannot become a PEFT adapter.")
        if merge:
            raise UserError(
                f"{source.path} is a complete model, so there is nothing to merge; leave out --merge."
            )
    elif merge and kind == "peft":
        raise UserError("a merged model is no adapter; leave out --merge, or choose another kind than peft.")
    elif kind != "peft" and not merge:
        raise UserError(
            f"{source.path} holds an adapter for {source.base.path}; add --merge to write the complete model, or --to "
            "peft to write the adapter alone."
        )


def _write_peft(source: AdaptedSource, folder: Path, dtype: str) -> Conversion:
    """Writes an adapter as PEFT's, and compares it."""
    adapter = source.adapter
    matrices = {
        place: (_cast(a, dtype, place.path), _cast(b, dtype, place.path))
        for place, (a, b) in adapter.matrices.items()
    }
    peft.write(folder, adapter.settings, adapter.identity, matrices, source.base_name, dtype)
    _, _, written = peft.read(folder, source.config)
    for place, both in matrices.items():
        for expected, found in zip(both, written[place], strict=True):
            if not np.array_equal(_bits(found), _bits(expected)):
                raise UserError(f"{folder} does not hold {place.path} as it was written; convert again.")
    dtypes = tuple(sorted({matrix.dtype.name for both in adapter.matrices.values() for matrix in both}))
    return Conversion(source.kind, "peft", dtype, dtypes, 2 * len(matrices))


def check_arguments(
    target: Path, kind: str | None, dtype: str | None, tokenizer: str | Path | None
) -> str | None:
    """Returns the kind of the target; None if it depends on the source. Raises UserError for an invalid argument."""
    kind = kind or _SUFFIXES.get(target.suffix)
    if kind not in (*KINDS, None):
        raise UserError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}.")
    accepted = {"gguf": DTYPES + QUANTISED, "litert": ("float32",)}.get(kind or "", DTYPES)
    if dtype not in (*accepted, None):
        raise UserError(
            f"dtype is {dtype!r}; accepted for a {kind or 'run or huggingface'} target: {', '.join(accepted)}."
        )
    if tokenizer is not None:
        Tokenizer.load(tokenizer)
    if kind == "gguf":
        gguf.package()
    elif kind == "litert":
        check_extra()
    return kind


def _write_run(source: WeightSource, folder: Path, dtype: str, progress: Progress) -> None:
    mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    params = load_params(
        source, source.config, dtype, mesh, lambda done, total: progress("reading", done, total)
    )
    progress("writing", 0, 1)
    write_run(folder, source.config, params, _tokenizer_file(source), source.metadata)


def _write_huggingface(
    source: WeightSource, folder: Path, dtype: str, tokenizer: Tokenizer, progress: Progress
) -> None:
    config = without_padding(source.config)
    entries = expand(HUGGINGFACE, weight_specs(config))
    tokens, metadata = config.num_tokens, source.metadata
    ids = huggingface.token_ids(tokenizer)
    # The source's own token ids take precedence over the tokenizer's.
    named = {**ids, **metadata.token_ids(tokens)}
    for name, content in (
        (CONFIG_FILE, {**config_json(config, dtype), **metadata.model, **named}),
        (GENERATION_FILE, {**named, **metadata.generation_json(tokens)}),
    ):
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    write_tokenizer_files(folder, read_model(_tokenizer_file(source)), metadata)

    def tensors() -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        for done, (name, entry) in enumerate(entries.items(), 1):
            yield name, (_cast(block, dtype, name) for block in _blocks(source, config, entry))
            progress("writing", done, len(entries))

    shapes = {name: entry.shape for name, entry in entries.items()}
    huggingface.write_shards(folder, tensors(), shapes, dtype, SHARD_BYTES)


def _blocks(source: WeightSource, config: ModelConfig, entry: Entry) -> Iterator[np.ndarray]:
    """Yields a tensor of another layout in blocks of rows: several for the embedding, the largest by far, else one."""
    if entry.tensor.weights == (EMBEDDING,):
        yield from (source.rows(entry.places[0], rows) for rows in row_blocks(entry.shape))
    else:
        yield entry.join([_weight(source, place, config) for place in entry.places])


def _tokenizer_file(source: WeightSource) -> Path:
    assert source.tokenizer is not None  # `load_tokenizer` has read it
    return source.tokenizer


def _write_gguf(
    source: WeightSource, path: Path, dtype: str, name: str, importance: gguf.Importance, progress: Progress
) -> tuple[str, ...]:
    """Writes and compares a GGUF file; returns notes."""
    config = without_padding(source.config)
    entries = expand(GGUF, weight_specs(config))
    encoding = _ENCODINGS.get(dtype, dtype)
    note = gguf.write_gguf(
        path,
        config,
        _tensors(source, config, entries, progress, "writing"),
        read_model(_tokenizer_file(source)),
        encoding,
        name,
        source.metadata,
        importance,
    )
    written = _tensors(source, config, entries, progress, "verifying")
    gguf.compare_gguf(path, config, written, encoding, importance)
    return () if note is None else (note,)


def _write_litert(
    source: WeightSource, path: Path, settings: LiteRTSettings, progress: Progress
) -> tuple[str, ...]:
    """Writes and compares a LiteRT-LM file; returns notes."""
    config = without_padding(source.config)
    entries = expand(HUGGINGFACE, weight_specs(config))
    file = LiteRTFile(config, settings, read_model(_tokenizer_file(source)), source.metadata)
    file.write(path, _tensors(source, config, entries, progress, "writing"))
    file.compare(path, _tensors(source, config, entries, progress, "verifying"))
    note = template_note(source.metadata)
    return () if note is None else (note,)


def _tensors(
    source: WeightSource, config: ModelConfig, entries: dict[str, Entry], progress: Progress, stage: str
) -> Iterator[tuple[str, Blocks]]:
    """Yields the tensors of another layout, made of the source's weights, in blocks of rows, one at a time."""
    for done, (name, entry) in enumerate(entries.items(), 1):
        yield name, _blocks(source, config, entry)
        progress(stage, done, len(entries))


def _weight(source: WeightSource, place: WeightPlace, config: ModelConfig) -> np.ndarray:
    weight = source.weight(place)
    return weight[: config.vocab_size] if place.path == EMBEDDING else weight


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    check_range(array, dtype, name)
    with np.errstate(invalid="ignore"):
        return array.astype(dtype)


def _compare(source: WeightSource, written: WeightSource, dtype: str, progress: Progress) -> None:
    """Raises UserError unless every written weight reads back bit for bit as the source's."""
    written.check()
    places = list(all_places(weight_specs(source.config)))
    embedding = written.config.vocab_size, written.config.d_model
    for done, place in enumerate(places, 1):
        for rows in row_blocks(embedding) if place.path == EMBEDDING else [slice(None)]:
            expected = _cast(source.rows(place, rows), dtype, place.path)
            found = written.rows(place, rows)
            if found.dtype != expected.dtype or not np.array_equal(_bits(found), _bits(expected)):
                raise UserError(
                    f"{written.path} does not hold {place.path} as it was written; check the disk and convert again."
                )
        progress("verifying", done, len(places))


def _bits(array: np.ndarray) -> np.ndarray:
    # As integers, so that a NaN equals itself and 0.0 differs from -0.0.
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
