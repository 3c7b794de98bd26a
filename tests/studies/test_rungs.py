"""Successive halving: which trials go on, in whatever order results arrive."""

import random

import pytest

from gemma2_jax.studies.rungs import Halving, certain, planned_steps


def test_the_best_go_on_once_nothing_can_displace_them():
    scores = {4: 0.1, 2: 0.3, 7: 0.2}
    assert certain(scores, outstanding=3, quota=3) == []
    assert certain(scores, outstanding=2, quota=3) == [4]
    assert certain(scores, outstanding=0, quota=2) == [4, 7]
    assert certain({1: 0.5, 0: 0.5, 2: None}, outstanding=0, quota=1) == [0]


def finish(halving: Halving, loss, order: random.Random) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Trains trials in any order that the rungs allow; returns each one's last stage, and the order."""
    losses: dict = {stage: {} for stage in range(halving.stages)}
    begin = {number: bracket for bracket, members in enumerate(halving.members()) for number in members}
    trained: list[tuple[int, int]] = []
    while True:
        allowed = halving.stages_of(losses)
        ready = []
        for number, last in allowed.items():
            stage = next(
                (each for each in range(begin[number], last + 1) if number not in losses[each]), None
            )
            if stage is not None and not any(losses[each].get(number, 0) is None for each in range(stage)):
                ready.append((number, stage))
        if not ready:
            return allowed, trained
        number, stage = order.choice(ready)
        losses[stage][number] = loss(number, stage)
        trained.append((number, stage))


@pytest.mark.parametrize("brackets", [1, 2, 3])
@pytest.mark.parametrize("failing", [frozenset(), frozenset({3, 8}), frozenset(range(17))])
def test_the_result_does_not_depend_on_the_order(brackets, failing):
    halving = Halving(total=18, stages=3, reduction=3, brackets=brackets)

    def loss(number, stage):
        if number in failing and stage >= number % 2:
            return None
        return (number * 7 % 18 + 1) / (stage + 1)

    found = [finish(halving, loss, random.Random(seed)) for seed in range(20)]
    assert all(sorted(trained) == sorted(found[0][1]) for _, trained in found)
    assert len({tuple(trained) for _, trained in found}) > 1
    if not failing:
        sizes = [halving.sizes(bracket) for bracket in range(brackets)]
        expected = sum(each.get(stage, 0) for each in sizes for stage in range(3))
        assert len(found[0][1]) == expected


def test_without_brackets_it_is_halving():
    halving = Halving(total=18, stages=3, reduction=3)
    assert halving.sizes(0) == {0: 18, 1: 6, 2: 2}
    allowed, _ = finish(halving, lambda number, stage: number, random.Random(0))
    assert {number for number, stage in allowed.items() if stage == 2} == {0, 1}
    assert {number for number, stage in allowed.items() if stage >= 1} == set(range(6))
    assert planned_steps(halving, [10, 30, 90]) == 18 * 10 + 6 * 20 + 2 * 60


def test_brackets_share_the_trials_as_in_hyperband():
    halving = Halving(total=27, stages=3, reduction=3, brackets=3)
    sizes = [len(members) for members in halving.members()]
    assert sum(sizes) == 27
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert sorted(number for members in halving.members() for number in members) == list(range(27))


def test_a_reduction_beyond_the_trials_leaves_one():
    assert Halving(total=2, stages=3, reduction=4).sizes(0) == {0: 2, 1: 1, 2: 1}
    assert Halving(total=1, stages=1, reduction=3).stages_of({}) == {0: 0}
