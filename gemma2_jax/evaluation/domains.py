"""Domains: parts of an evaluation's text that have scores of their own, from files or from prepared data."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.masks import MaskedTokens
from gemma2_jax.data.mixture import components
from gemma2_jax.data.pipeline import stored_documents, validation_batches
from gemma2_jax.data.shards import MIXTURE_FORMAT, read_data_manifest
from gemma2_jax.data.sources import DocumentSource, open_documents
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.config import EvaluationConfig

_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)
Advance = Callable[[float], None]  # takes the fraction of a domain that has been read


class ScoredDocument(NamedTuple):
    """The token ids of a document without bos and eos, int [n], and whether each is to be scored, bool [n]."""

    ids: np.ndarray
    scored: np.ndarray


class Domain(Protocol):
    """A part of the text."""

    @property
    def name(self) -> str:
        """Its name in the results."""

    @property
    def place(self) -> str:
        """The files or the folder that it comes from."""

    def check(self, tokenizer: Tokenizer, checkpoint: str) -> None:
        """Raises UserError if a checkpoint with this tokenizer cannot be evaluated on it."""

    def documents(self, tokenizer: Tokenizer, advance: Advance) -> Iterator[ScoredDocument]:
        """Yields the documents to score, in order."""

    def prompts(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """Yields documents without bos and eos, int [n], that a model may have memorised, in a fixed order."""


@dataclass(frozen=True)
class FilesDomain:
    """The documents of files."""

    name: str
    place: str
    source: DocumentSource

    def check(self, tokenizer: Tokenizer, checkpoint: str) -> None:
        with _as_text_setting():
            if next(iter(self.source), None) is None:
                raise UserError(f"evaluation.text {self.place} holds no text; give files that do.")

    def documents(self, tokenizer: Tokenizer, advance: Advance) -> Iterator[ScoredDocument]:
        with _as_text_setting():
            for text, done in self.source:
                advance(done / max(self.source.size, 1))
                ids = np.array(tokenizer.encode(text), np.int32)
                yield ScoredDocument(ids, np.ones(len(ids), bool))

    def prompts(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        for document in self.documents(tokenizer, lambda fraction: None):
            yield document.ids


@dataclass(frozen=True)
class PreparedDomain:
    """The held-out documents of prepared data; `data` is no mixture."""

    name: str
    place: str
    data: DataConfig

    def check(self, tokenizer: Tokenizer, checkpoint: str) -> None:
        prepared = read_data_manifest(self.data.folder).tokenizer
        if prepared != tokenizer.fingerprint:
            raise UserError(
                f"{checkpoint} has the tokenizer {tokenizer.fingerprint[:12]}, but {self.data.folder} was prepared "
                f"with {prepared[:12]}; give text files, evaluation.text."
            )
        stored_documents(self.data, "validation")

    def documents(self, tokenizer: Tokenizer, advance: Advance) -> Iterator[ScoredDocument]:
        documents = stored_documents(self.data, "validation")
        for number, document in enumerate(documents, 1):
            advance(number / len(documents))
            yield _scored(document)

    def prompts(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        for document in stored_documents(self.data, "train").shuffle(seed=0):
            yield _scored(document).ids

    def batches(self, share: int, shares: int, limit: int | None, advance: Advance) -> Iterator[Batch]:
        """Yields the batches of validations during training."""
        counts = read_data_manifest(self.data.folder).validation
        total = counts.tokens - counts.documents
        if limit is not None:
            total = min(total, limit * self.data.batch_size * self.data.seq_len)
        done = 0
        for batch in validation_batches(self.data, share, shares, limit):
            done += int((batch.segment_ids > 0).sum()) * shares
            advance(min(1.0, done / total))
            yield batch


def open_domains(
    config: EvaluationConfig, run_data: DataConfig | None, context: int, batch: int
) -> list[Domain]:
    """Returns the domains of an evaluation.

    Args:
        run_data: data of the first checkpoint's run, for an evaluation without text or data of its own.
        context, batch: tokens in a row and rows in a batch of prepared data.

    Raises:
        UserError: files or data cannot be read, or two domains have one name.
    """
    if config.text:
        found = [_open_text(text, config) for text in config.text]
        for name, count in Counter(domain.name for domain in found).items():
            if count > 1:
                raise UserError(
                    f"evaluation.text has {count} domains with the name {name}; give each a name of its own, as in "
                    "NAME=GLOB."
                )
        return list(found)
    if config.data is not None:
        parts = list(_data_of(config.data))
    else:
        assert run_data is not None
        parts = [part for part, _ in components(run_data)]
    return [
        PreparedDomain(name, part.folder, replace(part, seq_len=context, batch_size=batch, streams=1))
        for name, part in zip(_names(parts), parts, strict=True)
    ]


def _open_text(text: str, config: EvaluationConfig) -> FilesDomain:
    named = None if Path(text).exists() else _NAMED.fullmatch(text)
    name, pattern = (text, text) if named is None else named.groups()
    with _as_text_setting():
        source = open_documents((pattern,), config.text_field, config.skip_invalid)
    return FilesDomain(name, pattern, source)


def _data_of(folder: str) -> Iterator[DataConfig]:
    """Yields the data of a prepared folder, or of each part of a mixture; sizes of rows are to be replaced."""
    manifest = read_data_manifest(folder)
    if manifest.format == MIXTURE_FORMAT:
        for name in dict.fromkeys(shard.file.partition("/")[0] for shard in manifest.train_shards):
            yield from _data_of(f"{folder}/{name}")
        return
    yield DataConfig(
        source=manifest.source,
        folder=folder,
        validation_fraction=manifest.validation_fraction,
        seq_len=2,
        batch_size=1,
        seed=0,
        text_field=manifest.text_field,
        conversations=manifest.conversations,
    )


def _names(parts: list[DataConfig]) -> Iterator[str]:
    """Yields the sources of each part as its name, with a number if an earlier part has the same ones."""
    seen: Counter[str] = Counter()
    for part in parts:
        name = " ".join(part.sources)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _scored(document: np.ndarray | MaskedTokens) -> ScoredDocument:
    """Returns a stored document without its bos and, if it is text, its eos."""
    if isinstance(document, MaskedTokens):
        return ScoredDocument(document.ids[1:].astype(np.int32), document.loss[1:])
    return ScoredDocument(document[1:-1].astype(np.int32), np.ones(len(document) - 2, bool))


@contextmanager
def _as_text_setting() -> Iterator[None]:
    """Replaces the name of the key in messages about files."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("data.source", "evaluation.text")) from None
