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
from gemma2_jax.planning.memory import Parts, frozen_bytes, head_blocks, saved_activations, shares, width_of
from gemma2_jax.planning.plan import Plan, make_plan
from gemma2_jax.planning.program import models_in_step, planned_method
from gemma2_jax.planning.topologies import Machines, Topology, find_machines
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import AXES, MeshConfig
from gemma2_jax.training.start import with_prepared_vocabulary

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
        compute, network: seconds per step of the products and of the communication, estimated by formula.
        parts: memory per device by content, estimated by formula.
        fits: whether the estimate is within the memory of a device.
    """

    runs: list[RunConfig]
    overrides: str
    compute: float
    network: float
    parts: Parts
    fits: bool

    @property
    def seconds(self) -> float:
        """Seconds per step if nothing overlaps, which is pessimistic but ranks settings well."""
        return self.compute + self.network


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
    waiting = _all_candidates(runs, topology.machines)
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


def estimate(config: RunConfig, topology: str) -> list[Candidate]:
    """Estimates memory and time of a step by formula, for every mesh, remat policy and number of microbatches.

    Compiles nothing, so it needs no compiler for the devices. These are the candidates of `gemma2 plan --search`, in
    the order in which it tries them: those that should fit first, the fastest first. `plan` gives exact figures.

    Args:
        topology: a name such as `v5e:4x4`, `h100:8` or `cpu:1`.

    Raises:
        UserError: the topology is unknown, or no mesh of its devices divides model and batch.
    """
    return _all_candidates([with_prepared_vocabulary(config)], find_machines(topology))


def _all_candidates(runs: Sequence[RunConfig], machines: Machines) -> list[Candidate]:
    found = candidates(runs, planned_method(runs), machines)
    if not found:
        raise UserError(
            f"no mesh of the {machines.devices} devices of {machines.name} divides both the heads of the model "
            f"(and its teacher) and data.batch_size, which is {runs[0].data.batch_size}; set data.batch_size to a "
            f"multiple of {machines.devices}."
        )
    return found


def candidates(runs: Sequence[RunConfig], method: Method, machines: Machines) -> list[Candidate]:
    """Lists all candidates whose sizes divide evenly.

    Those that should fit come first, the fastest by formula first; the rest follow in order of their memory.
    """
    config, models, found = runs[0], models_in_step(method), []
    for mesh in _meshes(runs, method.frozen_models.values(), machines):
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
                content = estimated_parts(changed, models, shape)
                found.append(
                    Candidate(
                        changed,
                        " ".join(f"{key}={value}" for key, value in settings.items()),
                        *estimated_seconds(changed, models, machines, shape),
                        content,
                        content.total <= machines.capacity,
                    )
                )

    def order(candidate: Candidate) -> tuple[bool, float, float]:
        seconds, memory = candidate.seconds, candidate.parts.total
        return (False, seconds, memory) if candidate.fits else (True, memory, seconds)

    return sorted(found, key=order)


def estimated_parts(
    runs: Sequence[RunConfig], models: Collection[FrozenModel], shape: dict[str, int]
) -> Parts:
    """Estimates the memory per device by formula: all weights are split evenly over fsdp and tensor.

    Gradients include their sum over microbatches.
    """
    split = shape["fsdp"] * shape["tensor"]
    by_run = {run.name: 4 * _count_divided(run)[0] // split for run in runs}
    parameters = sum(by_run.values())
    teacher = sum(width_of(model.dtype) * count_parameters(model.config).total for model in models)
    return Parts(
        parameters=parameters,
        parameters_by_run=by_run,
        moments=2 * parameters,
        averaged=sum(by_run[run.name] for run in runs if run.training.ema is not None),
        gradients=parameters * (2 if runs[0].training.accumulation > 1 else 1),
        base=sum(map(frozen_bytes, runs)) // split,
        teacher=teacher // split,
        activations=sum(saved_activations(run, shape) for run in runs),
        logits=head_blocks(runs, shape),
    )


def _count_divided(run: RunConfig) -> tuple[int, int]:
    """The numbers of trained and of frozen weights."""
    trained, frozen = divided_specs(run.adaptation, run.model)
    return count_weights(trained), count_weights(frozen)


def estimated_seconds(
    runs: Sequence[RunConfig], models: Collection[FrozenModel], machines: Machines, shape: dict[str, int]
) -> tuple[float, float]:
    """Estimates the seconds per step of the products, and of the communication, by formula.

    Weights are gathered over fsdp for the forward and the backward pass of each microbatch, and gradients are summed
    there; activations are summed over tensor four times per layer; keys and values are gathered over sequence.
    """
    chip, config = machines.chip, runs[0]
    devices, width = machines.devices, width_of(config.compute.dtype)
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
    links = chip.link_bandwidth * (2 if chip.dimensions else 1)
    return flops / devices / chip.peak_flops, sent / links


def _meshes(
    runs: Sequence[RunConfig], frozen: Iterable[FrozenModel], machines: Machines
) -> Iterator[MeshConfig]:
    """Yields every mesh of the devices that divides all models, the frozen ones with the runs' layout included.

    mesh.replica stays as configured, unless it does not divide over the slices of a TPU; then it is one per slice.
    """
    config = runs[0]
    replica, devices = max(1, config.mesh.replica), machines.devices
    if machines.platform == "tpu" and replica % machines.slices:
        replica = machines.slices
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
