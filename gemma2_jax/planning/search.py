"""Search over meshes, remat policies and microbatch sizes for those that fit, ranked by their bound on step time."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gemma2_jax.config import UserError
from gemma2_jax.methods.method import FrozenModel, Method
from gemma2_jax.model.adaptation import divided_specs
from gemma2_jax.model.config import Remat
from gemma2_jax.model.counts import (
    count_parameters,
    count_weights,
    forward_flops_per_token,
    training_flops_per_token,
)
from gemma2_jax.planning.memory import frozen_bytes, head_blocks, saved_activations, shares, width_of
from gemma2_jax.planning.plan import Plan, make_plan
from gemma2_jax.planning.program import models_in_step, planned_method
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import AXES, MeshConfig

# The most devices that a sequence is split over, since each layer gathers keys and values.
_WIDEST_SEQUENCE = 8
# The fraction of a forward pass that the backward pass recomputes; products are most of it. Copies to the host and back
# may overlap with compute, but offloading should be tried after the policies without it.
_RECOMPUTED: dict[Remat, float] = {"none": 0.0, "dots": 0.15, "full": 1.0, "offload": 1.05}


@dataclass(frozen=True)
class Candidate:
    """A setting of mesh, remat policy and microbatch size.

    Attributes:
        runs: configurations of the program's runs with this setting.
        overrides: the setting as `key=value` overrides.
        seconds: seconds per step, estimated by formula.
        memory: bytes per device, estimated by formula.
    """

    runs: list[RunConfig]
    overrides: str
    seconds: float
    memory: float


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        plans: compiled candidates and their plans: those that fit first, then by bound on step time, then by memory.
        left: number of candidates that were not tried within the budget.
    """

    plans: list[tuple[Candidate, Plan]]
    left: int


def search(
    runs: Sequence[RunConfig],
    topology: Topology,
    budget: float,
    report: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Compiles candidates, most promising first, until the budget is spent; at least one is compiled.

    Args:
        runs: the runs that one program trains; a run with a teacher comes first (see `programs_of`).
        budget: seconds; no compilation starts after them.
        report: called with a line of text about each candidate tried.

    Raises:
        UserError: no mesh of these devices divides model and batch, or none of the candidates tried can be compiled.
    """
    config = runs[0]
    waiting = candidates(runs, planned_method(runs), topology)
    if not waiting:
        raise UserError(
            f"no mesh of the {len(topology.devices)} devices of {topology.name} divides both the heads of the model "
            f"(and its teacher) and data.batch_size, which is {config.data.batch_size}; set data.batch_size to a "
            f"multiple of {len(topology.devices)}."
        )
    started = time.perf_counter()
    plans: list[tuple[Candidate, Plan]] = []
    failure: UserError | None = None
    while waiting and (not (plans or failure) or time.perf_counter() - started < budget):
        candidate = waiting.pop(0)
        try:
            plan = make_plan(candidate.runs, topology)
        except UserError as error:  # some limits show only when compiling
            report(f"{candidate.overrides}: {error}")
            failure = error
            continue
        report(f"{candidate.overrides}: {'fits' if plan.fits else 'does not fit'}")
        plans.append((candidate, plan))
    if not plans and failure is not None:
        raise failure
    return SearchResult(sorted(plans, key=lambda pair: _rank(pair[1])), len(waiting))


def candidates(runs: Sequence[RunConfig], method: Method, topology: Topology) -> list[Candidate]:
    """Lists all candidates whose sizes divide evenly.

    Those that should fit come first, the fastest by formula first; the rest follow in order of their memory.
    """
    config, models, found = runs[0], models_in_step(method), []
    for mesh in _meshes(runs, method.frozen_models.values(), topology):
        shape = {axis: getattr(mesh, axis) for axis in AXES}
        rows, parts = shares(config, shape)
        if config.data.seq_len % parts:
            continue
        for accumulation in _divisors(config.data.batch_size):
            if config.data.batch_size // accumulation % rows:
                continue
            for remat in _RECOMPUTED:
                changed = [
                    replace(
                        run,
                        mesh=mesh,
                        compute=replace(run.compute, remat=remat),
                        training=replace(run.training, accumulation=accumulation),
                    )
                    for run in runs
                ]
                settings = {f"mesh.{axis}": size for axis, size in shape.items()}
                settings |= {"compute.remat": remat, "training.accumulation": accumulation}
                found.append(
                    Candidate(
                        changed,
                        " ".join(f"{key}={value}" for key, value in settings.items()),
                        estimated_seconds(changed, models, topology, shape),
                        estimated_memory(changed, models, shape),
                    )
                )
    capacity = topology.capacity

    def order(candidate: Candidate) -> tuple[bool, float, float]:
        fits = candidate.memory <= capacity
        return (
            (False, candidate.seconds, candidate.memory)
            if fits
            else (True, candidate.memory, candidate.seconds)
        )

    return sorted(found, key=order)


def estimated_memory(
    runs: Sequence[RunConfig], models: Collection[FrozenModel], shape: dict[str, int]
) -> float:
    """Estimates the bytes per device by formula: state, gradients, saved activations, logits and frozen `models`."""
    config = runs[0]
    split = shape["fsdp"] * shape["tensor"]
    counts = [_count_divided(run)[0] for run in runs]
    trained = sum(counts)
    state = 4 * 4 * trained + sum(map(frozen_bytes, runs))
    state += sum(4 * count for run, count in zip(runs, counts, strict=True) if run.training.ema is not None)
    if config.training.accumulation > 1:
        state += 4 * trained
    state += sum(width_of(model.dtype) * count_parameters(model.config).total for model in models)
    return state / split + sum(saved_activations(run, shape) for run in runs) + head_blocks(runs, shape)


def _count_divided(run: RunConfig) -> tuple[int, int]:
    """The numbers of trained and of frozen weights."""
    trained, frozen = divided_specs(run.adaptation, run.model)
    return count_weights(trained), count_weights(frozen)


def estimated_seconds(
    runs: Sequence[RunConfig], models: Collection[FrozenModel], topology: Topology, shape: dict[str, int]
) -> float:
    """Estimates the seconds per step by formula: time of the products plus time of the communication.

    Adding them without overlap is pessimistic, but ranks candidates well. Weights are gathered over fsdp for the
    forward and the backward pass of each microbatch, and gradients are summed there; activations are summed over
    tensor four times per layer; keys and values are gathered over sequence.
    """
    chip, config = topology.chip, runs[0]
    devices, width = len(topology.devices), width_of(config.compute.dtype)
    tokens = config.data.batch_size * config.data.seq_len
    flops = sum(forward_flops_per_token(model.config, config.data.seq_len) for model in models)
    for run in runs:
        trained, frozen = _count_divided(run)
        added = trained + frozen - count_parameters(run.model).total
        flops += training_flops_per_token(run.model, config.data.seq_len, frozen=frozen, added=added)
    flops *= tokens * (1 + _RECOMPUTED[config.compute.remat] / 4)
    weights = sum(count_parameters(run.model).total for run in runs) / shape["tensor"]
    gradients = sum(_count_divided(run)[0] for run in runs) / shape["tensor"]
    gathered = 2 * weights + gradients
    gathered += sum(count_parameters(model.config).total for model in models) / shape["tensor"]
    device_tokens = tokens / devices * shape["tensor"]
    sent = gathered * width * config.training.accumulation * _ring_share(shape["fsdp"])
    sent += 2 * 4 * gradients / shape["fsdp"] * _ring_share(shape["data"])
    for model in (run.model for run in runs):
        sent += (
            4 * model.num_layers * device_tokens * model.d_model * width * 2 * _ring_share(shape["tensor"])
        )
        keys_and_values = (
            2
            * model.num_kv_heads
            * model.head_dim
            / shape["tensor"]
            * width
            * device_tokens
            * shape["sequence"]
        )
        sent += 3 * model.num_layers * keys_and_values * _ring_share(shape["sequence"])
    return flops / devices / chip.peak_flops + sent / (chip.link_bandwidth * (2 if chip.dimensions else 1))


def _meshes(
    runs: Sequence[RunConfig], frozen: Iterable[FrozenModel], topology: Topology
) -> Iterator[MeshConfig]:
    """Yields every mesh of the devices that divides all models, the frozen ones with the runs' layout included.

    mesh.replica stays as configured, unless it does not divide over the slices of a TPU; then it is one per slice.
    """
    config = runs[0]
    replica, devices = max(1, config.mesh.replica), len(topology.devices)
    if topology.platform == "tpu" and replica % topology.slices:
        replica = topology.slices
    models = [run.model for run in runs]
    models += [model.config for model in frozen if not model.has_own_layout]
    for tensor in _divisors(math.gcd(*(model.num_kv_heads for model in models))):
        if any(model.d_ff % tensor or model.vocab_size % tensor for model in models):
            continue
        for sequence in _divisors(_WIDEST_SEQUENCE):
            rest, uneven = divmod(devices, replica * tensor * sequence)
            if uneven:
                continue
            for fsdp in _divisors(rest):
                mesh = MeshConfig(rest // fsdp, fsdp, tensor, sequence, replica)
                head = math.prod(getattr(mesh, axis) for axis in config.layout.head)
                if all(model.d_model % fsdp == 0 and model.vocab_size % head == 0 for model in models):
                    yield mesh


def _rank(plan: Plan) -> tuple[bool, float, int]:
    seconds = plan.bounds.seconds if plan.bounds is not None else 0.0
    return (not plan.fits, seconds, plan.program.memory.peak)


def _ring_share(count: int) -> float:
    """Returns the fraction of an array that each device sends in a ring of `count` devices."""
    return (count - 1) / count


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
