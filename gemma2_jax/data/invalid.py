"""Records that cannot be read: up to `data.skip_invalid` of them are counted and skipped, more raise an error.

A record is a line of JSONL, a row of Parquet, a document of a text file, or something that cannot be divided into
these: a file of unknown type, a broken link, the rest of a damaged file.
"""

from collections import Counter
from dataclasses import dataclass, field

from gemma2_jax.config import UserError

_SHOWN = 5  # skipped records whose places a message lists


@dataclass(frozen=True)
class Invalid:
    """A record that cannot be read.

    Attributes:
        place: its file, with the line or row.
        problem: what is wrong, worded the same for all records with the same problem.
        hint: what is accepted, or what to do.
        detail: details of this record only.
    """

    place: str
    problem: str
    hint: str = ""
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.place}: {self.problem}{detail}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Skipped:
    """The invalid records that were left out of a source.

    Attributes:
        records: number of skipped records; of: number of all records of the source, skipped ones included.
        problems: number of skipped records by problem.
        places: places of the first few.
    """

    records: int = 0
    of: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{problem}: {count:,}" for problem, count in self.problems.items())
        places = "; ".join(self.places) + ("; …" if self.records > len(self.places) else "")
        return f"{self.records:,} invalid records of {self.of:,} ({kinds}; first: {places})"


class Skipping:
    """Counts the invalid records of one pass over a source.

    Args:
        limit: `data.skip_invalid`: a number of records or, below 1, a fraction of all records.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._problems: Counter[str] = Counter()
        self._first: list[Invalid] = []

    def add(self, invalid: Invalid) -> None:
        """Counts a record. Raises UserError, with its place, if it exceeds the limit."""
        self._problems[invalid.problem] += 1
        if len(self._first) < _SHOWN:
            self._first.append(invalid)
        if self._limit == 0:
            raise UserError(f"{invalid}; data.skip_invalid=N leaves out up to N such records.")
        if self._limit >= 1 and self._problems.total() > self._limit:
            raise UserError(
                f"data.skip_invalid is {self._limit:g}, but data.source has more invalid records (next: {invalid}); "
                "fix them, or raise data.skip_invalid."
            )

    def finish(self, records: int) -> Skipped:
        """Returns what was skipped, given the source's number of records. Raises UserError if it exceeds the limit."""
        skipped = Skipped(
            self._problems.total(), records, dict(self._problems), tuple(each.place for each in self._first)
        )
        check_skipped(skipped, self._limit, "data.source has {}")
        return skipped


def check_skipped(skipped: Skipped, limit: float, where: str) -> None:
    """Raises UserError if more records were skipped than `limit` (`data.skip_invalid`) allows.

    Args:
        where: a clause with a placeholder {} for the skipped records.
    """
    allowed = limit if limit >= 1 or limit == 0 else limit * skipped.of
    if skipped.records > allowed:
        raise UserError(
            f"data.skip_invalid is {limit:g}, but {where.format(skipped)}; fix them, or set data.skip_invalid to at "
            f"least {skipped.records}."
        )
