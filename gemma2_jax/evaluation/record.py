"""The record of an evaluation, which `gemma2 eval --json` writes and reports read.

    {"format": 1, "versions": {"gemma2_jax": …, "jax": …, "python": …}, "created": "2026-01-31T12:00:00+00:00",
     "devices": "8 x cpu", "mesh": {"data": 8}, "dtype": "float32",
     "domains": {NAME: files or folder}, "windows": "document", "context": 2048, "stride": 2048, "batch": 8,
     "limit": null, "teacher": CHECKPOINT or null, "seconds": 12.3,
     "rows": [{"name": …, "checkpoint": CHECKPOINT, "seconds": …,
               "scores": {"document": {"domains": {NAME: SCORES}, "total": SCORES}},
               "memorisation": {"domains": {NAME: {…}}, "total": {…}} or null,
               "weight_bytes": …, "bytes_per_token": …, "fallbacks": […]}]}

`scores` is keyed by the kind of windows, so that numbers of different kinds, which are not comparable, have different
names. `build(EvaluationRecord, read_json(path), path)` reads a file back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma2_jax.config import to_dict
from gemma2_jax.evaluation.memorisation import Memorisation
from gemma2_jax.evaluation.scores import Scores
from gemma2_jax.files import write_text

FORMAT = 1


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint.

    Attributes:
        path: as given.
        kind: format of the checkpoint.
        identity: digest of the weights as float32, with an adapter merged (`formats.identity`).
        step: step of a run's checkpoint; None for others.
        averaged: whether the average of a run's weights was taken.
        adapter: folder of the adapter beside the checkpoint; None without one.
        parameters: number of parameters of the model, its tied embedding counted once, without adapters.
        tokenizer: sha256 of its SentencePiece model file.
        quantize: format that its matrices were evaluated in; None for arrays of the record's dtype.
        sliding_window: window of the local layers that the evaluation set (None: all layers were global);
            "checkpoint" if it set none.
    """

    path: str
    kind: str
    identity: str
    step: int | None
    averaged: bool
    adapter: str | None
    parameters: int
    tokenizer: str
    quantize: str | None = None  # Older files lack this key.
    sliding_window: int | Literal["checkpoint"] | None = "checkpoint"  # Older records lack this key.


@dataclass(frozen=True)
class DomainScores:
    """Scores by domain, and of all domains together, where each token has the same weight."""

    domains: Mapping[str, Scores]
    total: Scores


@dataclass(frozen=True)
class DomainMemorisation:
    """Results of the memorisation test by domain, and of all domains together."""

    domains: Mapping[str, Memorisation]
    total: Memorisation


@dataclass(frozen=True)
class EvaluationRow:
    """The results of one checkpoint, or of one adapter.

    Attributes:
        name: its name in tables.
        seconds: time of the evaluation, with loading and compilation.
        scores: by the kind of windows.
        memorisation: None if it was not tested.
        weight_bytes: bytes of the weights as they were evaluated.
        bytes_per_token: least bytes that generating one token after `context` tokens reads (`model.counts`).
        fallbacks: names of the weights that the format cannot hold, which were in int8 instead.
    """

    name: str
    checkpoint: EvaluatedCheckpoint
    seconds: float
    scores: Mapping[str, DomainScores]
    memorisation: DomainMemorisation | None
    # Older files lack these keys.
    weight_bytes: int | None = None
    bytes_per_token: int | None = None
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation of one or several checkpoints on the same text.

    Attributes:
        format: version of this record.
        versions: of gemma2_jax, jax and python.
        created: time of the end, in UTC, as in ISO 8601.
        devices: number and kind of the devices; mesh: sizes of the mesh axes above 1.
        dtype: dtype of weights and activations.
        domains: files or folder of each domain.
        windows: kind of windows: document, sliding or packed.
        context: tokens in a window; stride: tokens between two windows, None for packed ones.
        batch: rows in a batch.
        limit: maximum number of documents of each domain (packed windows: of batches); None for all.
        teacher: the teacher; None without one.
        seconds: time of everything.
        rows: results of each checkpoint.
    """

    format: int
    versions: Mapping[str, str]
    created: str
    devices: str
    mesh: Mapping[str, int]
    dtype: str
    domains: Mapping[str, str]
    windows: str
    context: int
    stride: int | None
    batch: int
    limit: int | None
    teacher: EvaluatedCheckpoint | None
    seconds: float
    rows: tuple[EvaluationRow, ...]

    def save(self, path: str | Path) -> None:
        """Writes the record as JSON, replacing an older file."""
        save_record(self, path)


def save_record(record: Any, path: str | Path) -> None:
    """Writes a record, a dataclass of numbers that are finite or None, as JSON, replacing an older file."""
    write_text(path, json.dumps(to_dict(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
