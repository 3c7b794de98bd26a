"""Settings in which runs differ."""

from collections.abc import Sequence

from gemma2_jax.messages import written
from gemma2_jax.reports.reported_runs import Run, flat

MISSING = "–"  # a key that a run's configuration lacks
_OWN = {"name", "output"}  # keys that differ for all runs


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns each dotted key whose value is not the same for all runs, with the value of each run as it is typed.

    Runs without a configuration are left out of the comparison and have no values.
    """
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OWN)
    found = {}
    for key in keys:
        values = [written(config[key]) if key in config else MISSING for config in configs]
        if len({value for value, config in zip(values, configs, strict=True) if config}) > 1:
            found[key] = values
    return found
