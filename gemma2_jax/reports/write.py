"""Writes a report: the page, and on request a CSV file and Markdown."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gemma2_jax.config import UserError, check_place, usable
from gemma2_jax.files import write_text
from gemma2_jax.reports.collect import collect
from gemma2_jax.reports.content import ReportContent
from gemma2_jax.reports.markdown import markdown
from gemma2_jax.reports.page import page
from gemma2_jax.reports.report_tables import runs_csv

_PAGE = "report.html"
_ENDINGS = {"--output": (".html", ".htm"), "--csv": (".csv",), "--markdown": (".md",)}


def write_page(
    paths: Sequence[str | Path],
    output: str | None = None,
    csv: str | None = None,
    markdown_file: str | None = None,
) -> tuple[Path, ReportContent]:
    """Writes the report of runs, sweeps, studies and evaluations.

    Args:
        output: file of the page; by default report.html in the folder, or in the deepest one that holds all paths.
        csv: file of the table of runs as CSV.
        markdown_file: file of the report as Markdown.

    Returns:
        The page's file, and what it shows.

    Raises:
        UserError: a path holds neither a run nor an evaluation, or a file cannot be written.
    """
    content = ReportContent(collect(paths))
    target = default_output(paths) if output is None else Path(output)
    files = {"--output": target}
    texts = {"--output": page(content, datetime.now())}
    if csv is not None:
        files["--csv"], texts["--csv"] = Path(csv), runs_csv(content.report.runs, content.groups)
    if markdown_file is not None:
        files["--markdown"], texts["--markdown"] = Path(markdown_file), markdown(content)
    for option, path in files.items():
        _check_file(option, path)
    for option, path in files.items():
        with usable(option, path):
            # The name of a run may hold half of a character.
            write_text(path, texts[option].encode("utf-8", "replace").decode())
    return target, content


def default_output(paths: Sequence[str | Path]) -> Path:
    """Returns the file of the page in the folder that was given, or in the deepest one that holds all paths."""
    folders = [Path(path).parent if Path(path).is_file() else Path(path) for path in paths]
    if len(folders) == 1:
        return folders[0] / _PAGE
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return Path(os.path.relpath(common)) / _PAGE


def _check_file(option: str, path: Path) -> None:
    endings = _ENDINGS[option]
    if path.suffix not in endings:
        raise UserError(f"{option} is {path}; accepted: a file that ends in {' or '.join(endings)}.")
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder; accepted: a file.")
    check_place(option, path, is_file=True)
