"""Costs of a study's runs: their training speed, and the time and size of their teacher caches."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.tables import Table
from gemma2_jax.training.metrics import read_metrics

_NOTHING = "–"  # an empty cell


@dataclass(frozen=True)
class RunCost:
    """The cost of a run over all of its seeds.

    Attributes:
        tokens_per_second: training speed, the median over the rows of metrics.
        cache_seconds: mean seconds to write the cache of one seed; None without caches.
        bytes_per_token: mean size of the caches in bytes per token; None without caches.
    """

    tokens_per_second: float
    cache_seconds: float | None = None
    bytes_per_token: float | None = None


def costs_by_run(
    study: StudyConfig, runs: Mapping[str, RunConfig], seconds: Mapping[str, float]
) -> dict[str, RunCost]:
    """Returns the cost of each run of the study.

    Args:
        runs: configurations by folder.
        seconds: seconds of each stage, from `read_times`.
    """
    return {
        name: _cost({folder: runs[folder] for folder in study.folders(name)}, seconds) for name in study.runs
    }


def costs_table(costs: Mapping[str, RunCost]) -> Table:
    """Returns a table with a row for each run, without the columns that are empty for all runs."""
    columns = {
        "tokens/s in training": [f"{cost.tokens_per_second:,.0f}" for cost in costs.values()],
        "writing the cache": [_cell(cost.cache_seconds, ",.0f", " s") for cost in costs.values()],
        "bytes per token": [_cell(cost.bytes_per_token, ".1f") for cost in costs.values()],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {_NOTHING}}
    return Table(["run", *shown], list(zip(costs, *shown.values(), strict=True)))


def _cost(seeds: Mapping[str, RunConfig], seconds: Mapping[str, float]) -> RunCost:
    speeds = [
        row["tokens_per_second"]
        for config in seeds.values()
        for row in read_metrics(config.output)
        if row["split"] == "train"
    ]
    speed = statistics.median(speeds)
    caches = {
        folder: config.distill.cache for folder, config in seeds.items() if config.distill.cache is not None
    }
    if not caches:
        return RunCost(speed)
    return RunCost(
        speed,
        statistics.mean(seconds[f"cache {folder}"] for folder in caches),
        statistics.mean(read_cache(cache).bytes_per_token for cache in caches.values()),
    )


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return _NOTHING if value is None else f"{value:{form}}{unit}"
