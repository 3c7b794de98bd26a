"""Points of a sweep from Optuna's samplers. The only file that imports Optuna.

A point depends on the sampler's seed, its number and the results that it is drawn from, and on nothing else, so that
a sweep draws the same points whatever its workers do.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma2_jax.config import UserError
from gemma2_jax.machine import is_installed
from gemma2_jax.studies.space import Axis, Choices

if TYPE_CHECKING:
    import optuna

History = Sequence[tuple[Mapping[str, str], float | None]]  # points, each with its loss; None if it failed


def check_optuna(method: str) -> None:
    """Raises UserError if Optuna is not installed."""
    if not is_installed("optuna"):
        raise UserError(
            f"method is {method}, which needs Optuna: pip install -e '.[sweep]'; grid, list and random do not need it."
        )


def quasi_random_points(space: Mapping[str, Axis], count: int, seed: int) -> list[dict[str, str]]:
    """Returns the first `count` points of a scrambled Sobol sequence; keys with a list of values are drawn at random.

    (Quasi-random points cover a space more evenly than random ones: Bergstra and Bengio, 2012, section 5.)
    """
    # Optuna would warn that lists are drawn at random.
    study = _study("QMCSampler", scramble=True, seed=seed, warn_independent_sampling=False)
    points = []
    for _ in range(count):
        trial = study.ask(_distributions(space))
        study.tell(trial, 0.0)
        points.append(_texts(space, trial.params))
    return points


def tpe_point(
    space: Mapping[str, Axis],
    history: History,
    pending: Sequence[Mapping[str, str]],
    seed: int,
    number: int,
) -> dict[str, str]:
    """Returns the point that the tree-structured Parzen estimator proposes.

    Args:
        history: results of earlier points.
        pending: points without results, which are avoided.
        number: number of the point, from 0.
    """
    from optuna.trial import TrialState, create_trial

    # The estimator's own generator starts afresh for each point, so it is seeded by the point's number too.
    seeded = seed * 1_000_003 + number
    study = _study("TPESampler", seed=seeded % 2**32, multivariate=True, constant_liar=True)
    distributions = _distributions(space)
    for point, loss in history:
        state = TrialState.FAIL if loss is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(state=state, value=loss, params=_numbers(space, point), distributions=distributions)
        )
    for point in pending:
        study.add_trial(
            create_trial(state=TrialState.RUNNING, params=_numbers(space, point), distributions=distributions)
        )
    return _texts(space, study.ask(distributions).params)


def _study(sampler: str, **options: Any) -> "optuna.Study":
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # about samplers and their options
        return optuna.create_study(sampler=getattr(optuna.samplers, sampler)(**options))


def _distributions(space: Mapping[str, Axis]) -> "dict[str, optuna.distributions.BaseDistribution]":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, axis in space.items():
        if isinstance(axis, Choices):
            found[key] = CategoricalDistribution(axis.values)
        elif axis.kind == "int":
            found[key] = IntDistribution(int(axis.low), int(axis.high))
        else:
            found[key] = FloatDistribution(axis.low, axis.high, log=axis.kind == "log_uniform")
    return found


def _numbers(space: Mapping[str, Axis], point: Mapping[str, str]) -> dict[str, Any]:
    """A point in Optuna's values."""
    return {
        key: point[key] if isinstance(axis, Choices) else (int if axis.kind == "int" else float)(point[key])
        for key, axis in space.items()
    }


def _texts(space: Mapping[str, Axis], params: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: params[key] if isinstance(axis, Choices) else axis.text(params[key])
        for key, axis in space.items()
    }
