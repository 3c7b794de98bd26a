"""Successive halving: which trials go on beyond each rung (Li et al., Hyperband, arXiv 1603.06560; ASHA, 1810.05934).

A trial goes on as soon as it is certain that it is among the best of its rung, whatever the unfinished trials of that
rung will achieve. Workers hardly ever wait, as in ASHA, but the result is that of synchronous halving: it depends
neither on the number of workers nor on their speed, nor on which of them are killed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Losses = Mapping[int, Mapping[int, float | None]]  # loss by stage and trial; None if the trial failed there


@dataclass(frozen=True)
class Halving:
    """The rungs of a sweep. Stage 0 ends at the first rung, stage 1 at the second, the last stage at the last step.

    Attributes:
        total: number of trials.
        stages: number of stages, one more than the number of rungs.
        reduction: at each rung, one of `reduction` trials continues.
        brackets: number of groups of trials; each begins one stage after the previous one.
    """

    total: int
    stages: int
    reduction: int
    brackets: int = 1

    def members(self) -> list[list[int]]:
        """Returns the numbers of the trials of each bracket, in Hyperband's proportions."""
        left = range(self.brackets - 1, -1, -1)
        weights = [self.reduction**rungs / (rungs + 1) for rungs in left]
        found: list[list[int]] = [[] for _ in weights]
        for number in range(self.total):
            bracket = min(range(self.brackets), key=lambda index: (len(found[index]) + 1) / weights[index])
            found[bracket].append(number)
        return found

    def sizes(self, bracket: int) -> dict[int, int]:
        """Returns the number of trials of a bracket that reach each stage, if none fails."""
        size, found = len(self.members()[bracket]), {}
        for stage in range(bracket, self.stages):
            found[stage] = size
            size = max(1, size // self.reduction) if size else 0
        return found

    def stages_of(self, losses: Losses) -> dict[int, int]:
        """Returns the last stage that each trial may be trained to, by the losses known so far."""
        found: dict[int, int] = {}
        for bracket, members in enumerate(self.members()):
            found |= dict.fromkeys(members, bracket)
            sizes = self.sizes(bracket)
            going, expected = members, len(members)
            for stage in range(bracket, self.stages - 1):
                known = losses.get(stage, {})
                scores = {number: known[number] for number in going if number in known}
                going = certain(scores, expected - len(scores), sizes[stage + 1])
                found |= dict.fromkeys(going, stage + 1)
                complete = len(scores) == expected
                succeeded = sum(loss is not None for loss in scores.values())
                expected = min(sizes[stage + 1], succeeded) if complete else sizes[stage + 1]
        return found


def certain(scores: Mapping[int, float | None], outstanding: int, quota: int) -> list[int]:
    """Returns the trials that are among the best `quota` whatever the outstanding ones achieve, best first.

    Of equal trials, the one with the lower number is better.
    """
    ranked = sorted((loss, number) for number, loss in scores.items() if loss is not None)
    return [number for _, number in ranked[: max(0, quota - outstanding)]]


def planned_steps(halving: Halving, ends: Sequence[int]) -> int:
    """Returns the steps of all trials together.

    Args:
        ends: the last step of each stage.
    """
    total = 0
    for bracket in range(halving.brackets):
        begin = 0
        for stage, size in halving.sizes(bracket).items():
            total += size * (ends[stage] - begin)
            begin = ends[stage]
    return total
