"""`gemma2 report`: one HTML page about runs, sweeps, studies and evaluations."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_verb

DESCRIPTION = """\
Writes one HTML file that shows and compares runs: a table to sort and filter, loss against steps, tokens, FLOPs and
time, the gain of students over training from scratch, samples side by side, settings that differ, and, for a sweep, the
importance of its keys. The file contains everything that it shows and needs no network.

  gemma2 report runs/quickstart                           a study, into runs/quickstart/report.html
  gemma2 report runs/a runs/b --open                      two runs, into runs/report.html, shown in the browser
  gemma2 report runs/sweeps/lr --csv lr.csv               a sweep, also as a table for other programs
  gemma2 report runs/quickstart --markdown quickstart.md

PATH is a run folder, a folder above some (of a study, a sweep, or others), or a file of `gemma2 eval --json`.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "report", run, "one HTML page about runs, sweeps and studies", DESCRIPTION)
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="run folders, folders above some, or files of gemma2 eval --json",
    )
    add(
        "--output",
        metavar="FILE",
        help="the page's file (report.html in PATH, or in the folder above all PATHs)",
    )
    add("--csv", metavar="FILE", help="also write the table of runs, as a .csv file")
    add("--markdown", metavar="FILE", help="also write the tables and samples, as a .md file")
    add("--open", action="store_true", help="show the page in the browser")


def run(arguments: argparse.Namespace) -> None:
    import sys

    from gemma2_jax.reports.reported_runs import counted
    from gemma2_jax.reports.write import write_page

    target, content = write_page(arguments.paths, arguments.output, arguments.csv, arguments.markdown)
    for note in content.report.notes:
        print(f"gemma2: {note}", file=sys.stderr)
    others = [file for file in (arguments.csv, arguments.markdown) if file is not None]
    print(f"report of {counted(content.report)} in {' and '.join([str(target), *others])}")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(target.resolve().as_uri()):
            print(f"gemma2: no browser was found; open {target} in one.", file=sys.stderr)
