"""Progress display on standard error of process 0: one live line on a terminal, occasional lines in a log file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from gemma2_jax.training.metrics import format_number

# Terms of the loss to show next to it, where a run has them.
_TERMS = (
    "kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "cross_entropy", "z_loss", "match_hidden",
    "match_attention",
)  # fmt: skip
_LONG = 2.0  # seconds; the log gets the duration of anything that takes longer
_SHORTEST_BAR, _LONGEST_BAR = 8, 40


class TrainingProgress:
    """Context manager that shows the current activity, step, loss and its terms, speed and time left.

    On a terminal this is one live line at the bottom, cut to the terminal's width. Elsewhere each row of metrics is one
    line, without control characters.
    """

    def __init__(self, name: str, steps: int, show: bool):
        self._console = Console(stderr=True, quiet=not show)
        self._name, self._steps, self._step = name, steps, 0
        self._status: list[str] = []
        self._doing: tuple[str, float] | None = None  # the activity between steps, and its start time
        self._idle_since = time.monotonic()  # end of the last activity
        self._begun: tuple[int, float] | None = None  # last step before this process, and the start time
        on_terminal = show and self._console.is_terminal
        self._live = Live(self, console=self._console, refresh_per_second=4) if on_terminal else None

    def __enter__(self) -> "TrainingProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def doing(self, what: str, brief: bool = False) -> Iterator[None]:
        """Shows `what` and a clock while the block runs; a log gets a line before it, and one after if it took long.

        Args:
            brief: write no line to a log, for an activity that recurs often.
        """
        begun = time.monotonic()
        before, self._doing = self._doing, (what, begun)
        in_log = self._live is None and not brief
        if in_log:
            self.print_line(f"{what} …")
        try:
            yield
        finally:
            self._doing, self._idle_since = before, time.monotonic()
        if in_log and self._idle_since - begun > _LONG:
            self.print_line(f"{what}: done in {duration(self._idle_since - begun)}")

    def advance(self, step: int) -> None:
        if self._begun is None:
            self._begun = step - 1, self._idle_since
        self._step = step

    def report(self, name: str, step: int, split: str, row: Mapping[str, float]) -> None:
        """Shows a row of a run's metrics: training in the live line if there is one, all else as a permanent line."""
        if split == "train":
            terms = [term for term in _TERMS if term in row and row[term] != row["loss"]]
            status = [f"{term} {row[term]:.4f}" for term in ("loss", *terms)]
            status.append(f"{row['tokens_per_second']:,.0f} tokens/s")
            self._status = status
        else:
            status = _evaluation(row)
        if split != "train" or self._live is None:
            self.print_line("  ".join([name, f"step {step}/{self._steps}", *status, self._left(step)]))

    def print_line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _left(self, step: int) -> str:
        """The estimated time for the steps after `step`, from the average so far, with validations and checkpoints."""
        if step >= self._steps:
            return f"{duration(0)} left"
        if self._begun is None or step <= self._begun[0]:
            return "time left unknown"
        each = (time.monotonic() - self._begun[1]) / (step - self._begun[0])
        return f"{duration(each * (self._steps - step))} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._line(options.max_width, plain=not options.encoding.startswith("utf"))

    def _line(self, width: int, plain: bool) -> Text:
        """The live line: the parts that are always shown, then as many metrics and as much of the bar as fit."""
        head, tail = f"{self._name}  {self._step}/{self._steps}", self._left(self._step)
        status = self._status
        if self._doing is not None:
            what, since = self._doing
            status, tail = [f"{what} {duration(time.monotonic() - since)}"], tail if self._begun else ""
        room = width - cell_len(head) - cell_len(tail) - 2
        shown = ""
        for part in status:
            if cell_len(shown) + cell_len(part) + 2 > room:
                break
            shown += f"{part}  "
        room -= cell_len(shown) + 2
        line = Text(no_wrap=True, overflow="ellipsis").append(head, "bold").append("  ")
        if room >= _SHORTEST_BAR:
            length = min(room, _LONGEST_BAR)
            done = length * self._step // max(self._steps, 1)
            full, empty = ("#", ".") if plain else ("━", "─")
            line.append(full * done, "green").append(empty * (length - done), "dim").append("  ")
        return line.append(shown).append(tail)


def _evaluation(row: Mapping[str, float]) -> list[str]:
    """The metrics of an evaluation: those of a model of text, or else all that the method has."""
    if "cross_entropy" not in row:
        own = [f"{name} {format_number(value, 4)}" for name, value in row.items() if name != "targets"]
        return [f"validation {own[0]}", *own[1:]] if own else ["validation"]
    found = [f"validation cross-entropy {row['cross_entropy']:.4f}"]
    if "averaged_cross_entropy" in row:
        found.append(f"of the averaged weights {row['averaged_cross_entropy']:.4f}")
    found.append(f"perplexity {format_number(row['perplexity'], 2)}")
    found += [f"kl {row['kl']:.4f}"] if "kl" in row else []
    found += [f"agreement with the teacher {row['agreement']:.1%}"] if "agreement" in row else []
    found += [f"acceptance {row['acceptance']:.1%}"] if "acceptance" in row else []
    return found


def duration(seconds: float) -> str:
    """Formats seconds as a duration: 12 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes == 0:
        return f"{whole} s"
    if hours == 0:
        return f"{minutes} min {whole % 60:02} s"
    return f"{hours} h {minutes % 60:02} min" if days == 0 else f"{days} d {hours % 24} h"
