"""The contents of a report about its runs, computed once for the page and for Markdown."""

from dataclasses import dataclass
from functools import cached_property

from gemma2_jax.reports.groups import RunGroup, grouped_runs
from gemma2_jax.reports.report_tables import (
    Column,
    differences_table,
    groups_table,
    runs_table,
    shares_table,
)
from gemma2_jax.reports.reported_runs import Report
from gemma2_jax.reports.shares import Share, gap_shares

_MOST_NAMES = 5  # in a sentence


@dataclass(frozen=True)
class ReportContent:
    """The tables of a report and the sentences below them.

    Attributes:
        report: the runs.
    """

    report: Report

    @cached_property
    def groups(self) -> list[RunGroup]:
        return grouped_runs(self.report.runs)

    @cached_property
    def shares(self) -> list[Share]:
        return gap_shares(self.report.runs)

    @property
    def has_seeds(self) -> bool:
        """Whether several runs differ in their seeds only."""
        return any(len(each.losses) > 1 for each in self.groups)

    @property
    def runs_table(self) -> list[Column]:
        return runs_table(self.report.runs)

    @property
    def groups_table(self) -> list[Column]:
        return groups_table(self.groups)

    @property
    def shares_table(self) -> list[Column]:
        return shares_table(self.shares)

    @property
    def differences_table(self) -> list[Column]:
        return differences_table([run for run in self.report.runs if run.config])

    @property
    def scores_sentences(self) -> list[str]:
        """Sentences on what the scores in the table of runs are, and whether they may be compared."""
        runs = self.report.runs
        scored = [run for run in runs if run.cross_entropy is not None]
        sentences = ["Cross-entropy is in nats per token on the validation split."] if scored else []
        partly = [run.name for run in scored if not run.whole_split]
        if partly:
            names = ", ".join(partly) if len(partly) <= _MOST_NAMES else f"{len(partly)} runs"
            names = "all runs" if len(partly) == len(scored) else names
            sentences.append(
                f"Scores of {names} are those of the last validation in training, which uses at most "
                "training.eval_batches batches."
            )
        if len({run.data for run in scored if run.data is not None}) > 1:
            sentences.append(
                "The runs have different data or tokenizers, so their cross-entropies cannot be compared."
            )
        return sentences

    @property
    def shares_sentences(self) -> list[str]:
        """Sentences on how the shares of the students are computed."""
        sentences = [
            "Closed: (scratch - student) / (scratch - teacher), of cross-entropies on the validation split in nats, "
            "each student with the runs of its seed; 100 % is as good as the teacher. Scratch is the run without a "
            "teacher of the same sizes, data and tokens; of several, the best."
        ]
        if any(share.kept is not None for share in self.shares):
            sentences.append(
                "Kept: (scratch - student) / (scratch - online student), where the online student learns from the "
                "teacher's complete distributions in every step."
            )
        if not any(share.closed is not None and share.closed.count > 1 for share in self.shares):
            sentences.append("With one seed there is no interval.")
        return sentences
