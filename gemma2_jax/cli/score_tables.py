"""Prints the record of an evaluation as tables: a row for each checkpoint and domain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from gemma2_jax.evaluation.memorisation import Memorisation
from gemma2_jax.evaluation.record import EvaluationRecord
from gemma2_jax.evaluation.scores import BINS, Scores
from gemma2_jax.evaluation.windows import DOCUMENT, SLIDING
from gemma2_jax.studies.tables import Table, print_line
from gemma2_jax.training.metrics import format_number


def print_scores(record: EvaluationRecord) -> None:
    """Prints the scores, the results of the memorisation test if there are any, and what was evaluated how."""
    console = Console()
    _scores(record).print(console, f"{_described(record)}, on {record.devices} in {record.dtype}")
    if record.teacher is not None:
        _comparison(record).print(console, f"compared with {record.teacher.path}")
    if any(row.memorisation for row in record.rows):
        title = "memorisation: 50 tokens after a prompt of 50"
        _memorisation(record).print(console, title)
    if any(row.checkpoint.quantize for row in record.rows):
        _sizes(record).print(
            console, f"read a token: all weights, keys and values of {record.context:,} tokens"
        )
        for row in record.rows:
            if row.fallbacks:
                print_line(
                    console, f"{row.name}: odd rows cannot be halved, so {', '.join(row.fallbacks)} in int8"
                )
    print_line(console, f"calibration error: {BINS} bins of equal width, against the text", "dim")


def _described(record: EvaluationRecord) -> str:
    if record.windows == DOCUMENT:
        return f"document windows of {record.context:,} tokens"
    if record.windows == SLIDING:
        return f"sliding windows of {record.context:,} tokens, stride {record.stride:,}"
    return f"packed rows of {record.context:,} tokens, as in training"


def _scores(record: EvaluationRecord) -> Table:
    kind = record.windows
    columns: dict[str, Callable[[Scores], str]] = {
        "tokens": lambda scores: f"{scores.tokens:,}",
        f"{kind} perplexity": lambda scores: format_number(scores.perplexity, 3),
        f"{kind} bits/byte": lambda scores: format_number(scores.bits_per_byte, 4),
        "calibration error": lambda scores: format_number(scores.calibration_error, 4),
    }
    return _table_of_scores(record, columns)


def _comparison(record: EvaluationRecord) -> Table:
    columns: dict[str, Callable[[Scores], str]] = {
        "KL": lambda scores: format_number(scores.kl, 4),
        "agreement": lambda scores: _percent(scores.agreement),
        "acceptance": lambda scores: _percent(scores.acceptance),
        "confidence difference": lambda scores: format_number(scores.confidence_difference, 4),
    }
    return _table_of_scores(record, columns)


def _sizes(record: EvaluationRecord) -> Table:
    rows = [
        [
            row.name,
            row.checkpoint.quantize or record.dtype,
            *map(_megabytes, (row.weight_bytes, row.bytes_per_token)),
        ]
        for row in record.rows
    ]
    return Table(["checkpoint", "matrices in", "weights MB", "read a token MB"], rows, left=2)


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.3f}"


def _table_of_scores(record: EvaluationRecord, columns: Mapping[str, Callable[[Scores], str]]) -> Table:
    found = {row.name: row.scores[record.windows] for row in record.rows}
    return _table(record, columns, {name: (each.domains, each.total) for name, each in found.items()})


def _memorisation(record: EvaluationRecord) -> Table:
    columns: dict[str, Callable[[Memorisation], str]] = {
        "documents": lambda result: f"{result.documents:,}",
        "exact": lambda result: _percent(result.exact_rate),
        "within 10 %": lambda result: _percent(result.approximate_rate),
    }
    found = {row.name: row.memorisation for row in record.rows if row.memorisation is not None}
    return _table(record, columns, {name: (each.domains, each.total) for name, each in found.items()})


def _table(
    record: EvaluationRecord,
    columns: Mapping[str, Callable[[Any], str]],
    results: Mapping[str, tuple[Mapping[str, Any], Any]],
) -> Table:
    """A table with the rows of each domain together, and those of all domains at the end, if there are several.

    Args:
        results: of each checkpoint: results by domain, and the result of all domains.
    """
    several = len(record.domains) > 1

    def rows() -> Iterator[Sequence[str]]:
        for domain in [*record.domains, *([None] if several else [])]:
            for name, (domains, total) in results.items():
                result = total if domain is None else domains[domain]
                named = [name, domain or "all together"] if several else [name]
                yield [*named, *(cell(result) for cell in columns.values())]

    left = ["checkpoint", "domain"] if several else ["checkpoint"]
    return Table([*left, *columns], list(rows()), left=len(left))


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.1%}"
