"""Collects what a report shows from the paths that a user gives."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, read_json, read_yaml
from gemma2_jax.reports.evaluations import check_evaluation
from gemma2_jax.reports.folders import failure, find_runs
from gemma2_jax.reports.reported_runs import Report, Run, TextSample, setting, short_name
from gemma2_jax.reports.sizes import read_sizes
from gemma2_jax.training.metrics import JSON_LINES, is_number, scan_metrics
from gemma2_jax.training.start import DATA_FILE, MACHINE_FILE

RESULTS_FILE = "results.json"  # of a study or sweep
EVALUATION_FILE = "evaluation.json"  # of a run of one


def collect(paths: Sequence[str | Path]) -> Report:
    """Collects the runs and evaluations at `paths`: run folders, folders above them, and files of `gemma2 eval`.

    Damaged and missing files are left out, with a note.

    Raises:
        UserError: a path holds neither a run nor an evaluation.
    """
    notes: list[str] = []
    runs: dict[Path, Run] = {}
    evaluations: dict[str, Any] = {}
    for path in map(Path, paths):
        if path.is_file():
            evaluations[str(path)] = check_evaluation(path, read_json(path))
            continue
        found = _runs_below(path, notes)
        if not found:
            raise _no_run(path)
        runs |= found
    results = {
        folder: results
        for folder in dict.fromkeys(folder.parent for folder in runs)
        if (results := _results(folder, notes)) is not None
    }
    machines = [results["machine"] for results in results.values() if isinstance(results, dict)]
    machines += [content.get("devices") for content in evaluations.values()]
    for folder in runs:
        if (folder / MACHINE_FILE).is_file():
            machines += (folder / MACHINE_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    return Report(
        _title(paths, list(results.values()), len(runs)),
        [str(path) for path in paths],
        _best_first(_with_distinct_names(runs)),
        list(dict.fromkeys(machine for machine in machines if isinstance(machine, str))),
        evaluations,
        notes,
    )


def _runs_below(path: Path, notes: list[str]) -> dict[Path, Run]:
    """Returns the runs at or below a path by their absolute folder, with the failed runs of sweeps there."""
    below = Path(os.path.realpath(path))  # accepts a loop of links, which holds no run
    folders = _as_in_results([folder.resolve() for folder in find_runs(path)])
    sweeps = {
        parent: _sweep_results(parent)
        for parent in dict.fromkeys([below, *(folder.parent for folder in folders)])
    }
    found = {}
    for folder in folders:
        shown = path / folder.relative_to(below)
        found[folder] = _read_run(shown, sweeps[folder.parent].get(folder.name, {}), notes)
    for parent, results in sweeps.items():
        for name, result in results.items():
            if result["error"] is not None and parent / name not in found and parent.is_relative_to(below):
                values, shown = result["values"], path / parent.relative_to(below) / name
                found[parent / name] = Run(short_name(values), shown, values=values, error=result["error"])
    return found


def _as_in_results(folders: Sequence[Path]) -> list[Path]:
    """Puts the runs of a study into its order; others keep theirs."""
    orders: dict[Path, list[str]] = {}
    for parent in dict.fromkeys(folder.parent for folder in folders):
        results = _json(parent / RESULTS_FILE, [])
        runs = results.get("runs") if isinstance(results, dict) else None
        orders[parent] = list(runs) if isinstance(runs, dict) else []
    parents = list(orders)

    def place(folder: Path) -> tuple[int, int]:
        order = orders[folder.parent]
        return parents.index(folder.parent), order.index(folder.name) if folder.name in order else len(order)

    return sorted(folders, key=place)


def _no_run(path: Path) -> UserError:
    if not path.exists():
        return UserError(
            f"{path} does not exist; accepted: run folders, folders above them, files of gemma2 eval."
        )
    if (path / CONFIG_FILE).is_file() and "model" in read_yaml(path / CONFIG_FILE):
        return UserError(
            f"{path} holds a model without a run; a run has {JSON_LINES}, which gemma2 train writes."
        )
    return UserError(
        f"{path} holds no run; looked for {JSON_LINES}, and for {CONFIG_FILE} of a run, in it and in the folders below "
        "it."
    )


def _read_run(folder: Path, result: Mapping[str, Any], notes: list[str]) -> Run:
    """Reads a run folder.

    Args:
        result: the run's entry in the results of its sweep; empty for other runs.
    """
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    if (folder / CONFIG_FILE).is_file():
        try:
            config = read_yaml(folder / CONFIG_FILE)
        except UserError as error:
            notes.append(str(error))
    else:
        notes.append(f"{folder / CONFIG_FILE} is missing, so the run's configuration is not shown.")
    if (folder / JSON_LINES).is_file():
        rows, damaged = scan_metrics(folder)
        notes += [f"{clause}; it is left out." for clause in damaged]
    name = config.get("name")
    values = result.get("values") or (_values(name) if isinstance(name, str) else {})
    evaluation = _evaluation(folder, rows, notes)
    parameters, flops = read_sizes(config, folder)
    scores = {"parameters": parameters, **_last_values(rows), **evaluation.get("evaluation", {})}
    return Run(
        short_name(values) or (name if isinstance(name, str) else folder.resolve().name),
        folder,
        config,
        rows,
        {key: value for key, value in scores.items() if is_number(value) and not math.isnan(value)},
        "evaluation" in evaluation,
        values,
        _samples(evaluation),
        flops,
        _data(folder),
        failure(folder) or result.get("error"),
    )


def _evaluation(folder: Path, rows: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Returns the content of evaluation.json; empty if there is none, or if the run was trained on since."""
    stored = _json(folder / EVALUATION_FILE, notes)
    if not isinstance(stored, dict) or not isinstance(stored.get("evaluation"), dict):
        return {}
    last = max((row["step"] for row in rows), default=0)
    step = setting(stored, "conditions.step")
    if isinstance(step, int) and step < last:
        notes.append(
            f"{folder / EVALUATION_FILE} is of step {step}, and the run is at step {last}; the last validation in "
            "training is shown instead."
        )
        return {}
    scores = {
        "cross_entropy" if name == "loss" else name: value for name, value in stored["evaluation"].items()
    }
    return {**stored, "evaluation": scores}  # older files call the cross-entropy loss


def _last_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of the last validation in training, and the tokens seen at the last row."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["split"] == "validation":
            found |= {key: value for key, value in row.items() if key not in ("step", "split", "targets")}
        elif "tokens_seen" in row:
            found["tokens_seen"] = row["tokens_seen"]
    return found


def _samples(evaluation: Mapping[str, Any]) -> list[TextSample]:
    found = [setting(evaluation, "conditions.prompts"), evaluation.get("samples")]
    prompts, texts = (each if isinstance(each, list) else [] for each in found)
    return [TextSample(str(prompt), str(text)) for prompt, text in zip(prompts, texts, strict=False)]


def _data(folder: Path) -> str | None:
    stored = _json(folder / DATA_FILE, [])
    return None if not isinstance(stored, dict) else " ".join(str(value) for value in stored.values())


def _values(name: str) -> dict[str, str]:
    """Returns the values in the name that a sweep gives its run, KEY=VALUE,KEY=VALUE; empty for other names."""
    parts = re.split(r"(?:^|,)([A-Za-z_][\w.]*)=", name)
    is_sweep = not parts[0] or parts[0].isdigit()  # numbered trials
    return dict(zip(parts[1::2], parts[2::2], strict=True)) if is_sweep else {}


def _sweep_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the values of each run of a sweep, and why it failed or None, by the name of its folder."""
    results = _json(folder / RESULTS_FILE, [])
    found = {}
    for result in results if isinstance(results, list) else []:
        if isinstance(result, dict) and isinstance(result.get("values"), dict):
            values = {str(key): str(value) for key, value in result["values"].items()}
            error = result.get("error")
            name = result.get("run") or _folder_name(values)  # older sweeps do not name it
            found[str(name)] = {"values": values, "error": None if error is None else str(error)}
    return found


def _folder_name(values: Mapping[str, str]) -> str:
    """The name that older sweeps gave to the folder of a run."""
    return re.sub(r"[^A-Za-z0-9_.,=+-]", "-", ",".join(f"{key}={value}" for key, value in values.items()))


def _results(folder: Path, notes: list[str]) -> Any:
    found = _json(folder / RESULTS_FILE, notes)
    return found if isinstance(found, list) or (isinstance(found, dict) and "machine" in found) else None


def _json(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except UserError as error:
        notes.append(str(error))
        return None


def _title(paths: Sequence[str | Path], results: Sequence[Any], runs: int) -> str:
    """The question of the study, if the runs belong to one; else the names of the paths, or their number."""
    titles = [results.get("title") if isinstance(results, dict) else None for results in results]
    if titles and isinstance(titles[0], str) and titles.count(titles[0]) == len(titles):
        return titles[0]
    names = [Path(path).resolve().name for path in paths]
    return " and ".join(names) if len(names) <= 2 or not runs else f"{runs} run{'s' * (runs > 1)}"


def _best_first(runs: list[Run]) -> list[Run]:
    """Sorts the runs of a sweep by their cross-entropy, those without one last; others keep their order."""
    if not all(run.values for run in runs):
        return runs
    return sorted(runs, key=lambda run: math.inf if run.cross_entropy is None else run.cross_entropy)


def _with_distinct_names(runs: Mapping[Path, Run]) -> list[Run]:
    """Renames runs of the same name to the shortest ends of their paths that differ."""
    together: dict[str, list[Path]] = {}
    for folder, run in runs.items():
        together.setdefault(run.name, []).append(folder)
    names = {folders[0]: name for name, folders in together.items() if len(folders) == 1}
    for folders in together.values():
        if len(folders) > 1:
            names |= _shortest_ends(folders)
    return [replace(run, name=names[folder]) for folder, run in runs.items()]


def _shortest_ends(folders: Sequence[Path]) -> dict[Path, str]:
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        ends = {folder: "/".join(folder.parts[-parts:]) for folder in folders}
        if len(set(ends.values())) == len(folders):
            return ends
    return {folder: str(folder) for folder in folders}
