"""Describes the content of a checkpoint without reading its weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.formats.adapter import AdaptedSource
from gemma2_jax.formats.based import BasedSource
from gemma2_jax.formats.gguf_header import Header, is_gguf, read_header
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.formats.load import load_tokenizer, open_source
from gemma2_jax.formats.native import RunSource
from gemma2_jax.formats.source import TensorInfo, WeightSource, mismatches
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.model.vocabulary import without_padding
from gemma2_jax.model.weights import weight_specs


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint.

    Attributes:
        lines: pairs of a name and a text.
        problems: what is wrong with the checkpoint, one sentence each.
    """

    lines: list[tuple[str, str]]
    problems: list[str]


def inspect(path: str | Path, published: Mapping[str, ModelConfig]) -> Inspection:
    """Describes a checkpoint of any kind, including GGUF.

    Args:
        published: models to compare sizes with, by name.

    Raises:
        UserError: there is no checkpoint at `path`, or its configuration is not a Gemma 2's.
    """
    if is_gguf(path):
        return _inspect_gguf(Path(path), read_header(path), published)
    source = open_source(path)
    problems = source.problems()
    if isinstance(source, RunSource):
        problems += [f"{clause}." for clause in source.skipped]
    lines = [
        ("kind", source.kind),
        ("path", str(source.path)),
        *([("step", f"{source.step:,}")] if isinstance(source, RunSource) else []),
        ("files", _files(source)),
        *(_trained_part(source) if isinstance(source, BasedSource) else []),
        *_model(source.config, source.tensors, published),
    ]
    try:
        tokenizer = load_tokenizer(source)
        lines += [
            ("tokenizer", f"{source.tokenizer}, {_describe(tokenizer)}"),
            ("stops at", ", ".join(map(str, sorted(tokenizer.stop_ids))) or "nothing"),
            ("chats", _template(source, tokenizer)),
            *_renamed(source, tokenizer),
        ]
    except UserError as error:
        lines.append(("tokenizer", "none" if source.tokenizer is None else "does not match"))
        problems.append(str(error))
    return Inspection(lines, problems)


def _inspect_gguf(path: Path, header: Header, published: Mapping[str, ModelConfig]) -> Inspection:
    lines = [
        ("kind", "GGUF"),
        ("path", str(path)),
        ("name", header.name or "none"),
        ("encoding", header.encoding),
        ("files", f"1 of {_size(path.stat().st_size)}"),
        *_model(header.config, header.tensors, published),
        ("tokenizer", f"in the file, {header.num_tokens:,} tokens"),
    ]
    shapes = {name: entry.shape for name, entry in expand(GGUF, weight_specs(header.config)).items()}
    problems = mismatches(path, shapes, header.tensors)
    if header.num_tokens != header.config.num_tokens:
        problems.append(
            f"{path} has a tokenizer of {header.num_tokens} tokens, but the model has {header.config.num_tokens}."
        )
    return Inspection(lines, problems)


def _model(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], published: Mapping[str, ModelConfig]
) -> list[tuple[str, str]]:
    counts = count_parameters(config)
    found = sum(math.prod(info.shape) for info in tensors.values())
    missing = "" if found == counts.total else f"; the tensors found hold {found:,}"
    dtypes = Counter(info.dtype for info in tensors.values())
    lines = [
        ("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common())),
        ("model", _sizes(config)),
        (
            "parameters",
            f"{counts.total:,} ({counts.embedding:,} embedding + {counts.non_embedding:,} other){missing}",
        ),
    ]
    for name, other in published.items():
        if (other.num_layers, other.d_model) == (config.num_layers, config.d_model):
            lines.append((name, _compared(config, other)))
            return lines
    lines.append(("published", f"no model of these sizes; known: {', '.join(published)}"))
    return lines


def _trained_part(source: BasedSource) -> list[tuple[str, str]]:
    """What was trained, and on which base model."""
    known = "" if source.identity is None else f", whose weights were {source.identity[:12]}"
    base = ("base", f"{source.base_name}{known}")
    if not isinstance(source, AdaptedSource):
        return [("trained", f"{source.trained_parameters:,} parameters, in {source.path}"), base]
    settings = source.adapter.settings
    layers = "all layers" if settings.layers is None else f"layers {', '.join(map(str, settings.layers))}"
    text = (
        f"{source.trained_parameters:,} parameters: rank {settings.rank}, scale {settings.scale:.4g}, on "
        f"{', '.join(settings.targets)} of {layers}"
    )
    return [("adapter", text), base]


def _compared(config: ModelConfig, other: ModelConfig) -> str:
    counts = count_parameters(other)
    text = f"{counts.total:,} parameters in the report ({counts.embedding:,} + {counts.non_embedding:,})"
    if config != other and config == without_padding(other):
        return f"{text}; the same model without its {other.vocab_padding} padded rows"
    differences = [
        f"{field.name} {getattr(config, field.name)}, published {getattr(other, field.name)}"
        for field in fields(ModelConfig)
        if getattr(config, field.name) != getattr(other, field.name)
    ]
    return f"{text}; {'; '.join(differences) if differences else 'the same model'}"


def _sizes(config: ModelConfig) -> str:
    padding = f" of which {config.vocab_padding} padding" if config.vocab_padding else ""
    period = 2 * config.global_every
    ratio = f" in {period - 1} of {period} layers" if period > 2 else ""
    return (
        f"{config.num_layers} layers of width {config.d_model}, {config.num_heads}/{config.num_kv_heads} heads of "
        f"{config.head_dim}, feed-forward {config.d_ff}, window {config.sliding_window}{ratio}, "
        f"{config.vocab_size:,} rows{padding}"
    )


def _files(source: WeightSource) -> str:
    places = {info.file for info in source.tensors.values()}
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    files = [file for file in files if file.is_file()]
    return f"{len(files)} of {_size(sum(file.stat().st_size for file in files))}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.4g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _template(source: WeightSource, tokenizer: Tokenizer) -> str:
    own = source.metadata.chat_template
    if own is not None and own != chat_template():
        return "a template of its own, which exports keep; --chat uses Gemma 2's"
    return "Gemma 2's format" if tokenizer.end_of_turn_id != tokenizer.eos_id else "none"


def _renamed(source: WeightSource, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns a line on tokens that other tokenizer files rename; tools that read only tokenizer.model miss these."""
    size = tokenizer.vocab_size
    names = {number: name for number, name in source.added_tokens(0).items() if number < size}
    others = {number: name for number, name in names.items() if name != tokenizer.piece(number)}
    if not others:
        return []
    shown = ", ".join(f"{number} {tokenizer.piece(number)} (there {name})" for number, name in others.items())
    return [("renamed", f"tokenizer.model is used, but tokenizer files beside it differ: {shown:.200}")]


def _describe(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}"
