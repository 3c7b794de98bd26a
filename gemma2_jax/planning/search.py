"""Which meshes, remat policies and microbatches fit, and which of them has the least bound on its step's time."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gemma2_jax.config import UserError
from gemma2_jax.distill.teacher import online_teacher, teacher_config
from gemma2_jax.model.config import Remat
from gemma2_jax.model.counts import count_parameters, forward_flops_per_token, training_flops_per_token
from gemma2_jax.planning.memory import head_blocks, saved_activations, shares
from gemma2_jax.planning.plan import Plan, make_plan
from gemma2_jax.planning.program import check_sizes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import AXES, MeshConfig

_WIDEST_SEQUENCE = (
    8  # devices that a sequence is split over at most: each layer's keys and values are gathered
)
# Of a forward pass, how much of it the backward pass computes again; products are most of it. What goes to the host and
# back may take no time, but is to be tried after what stays.
_RECOMPUTED: dict[Remat, float] = {"none": 0.0, "dots": 0.15, "full": 1.0, "offload": 1.05}


@dataclass(frozen=True)
class Candidate:
    """One way to lay a program out.

    Attributes:
        runs: that the program trains.
        overrides: what has to be typed for it.
        seconds, memory: of a step, and of a device; estimates by formula from before anything was compiled.
    """

    runs: list[RunConfig]
    overrides: str
    seconds: float
    memory: float


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plans: those that were compiled, those that fit first, by the bound on their time, then by their memory.
        left: candidates that the budget did not reach.
    """

    plans: list[tuple[Candidate, Plan]]
    left: int


def search(
    runs: Sequence[RunConfig],
    topology: Topology,
    budget: float,
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Compiles candidates, the most promising first, until `budget` seconds are spent; the first one always.

    Args:
        runs: that one program trains, of several one with a teacher first.

    Raises:
        UserError: no mesh of these devices divides model and batch, or none of those tried can be compiled.
    """
    config = runs[0]
    for run in runs:
        check_sizes(run)
    waiting = candidates(runs, topology)
    if not waiting:
        raise UserError(
            f"no mesh of the {len(topology.devices)} devices of {topology.name} divides the heads of the model and its "
            f"teacher and data.batch_size ({config.data.batch_size}); choose a data.batch_size that is a multiple of "
            f"{len(topology.devices)}."
        )
    begun = time.perf_counter()
    plans: list[tuple[Candidate, Plan]] = []
    refused: UserError | None = None
    while waiting and (not (plans or refused) or time.perf_counter() - begun < budget):
        candidate = waiting.pop(0)
        try:
            plan = make_plan(candidate.runs, topology)
        except UserError as error:  # what only the compiler knows to be impossible
            tell(f"{candidate.overrides}: {error}")
            refused = error
            continue
        tell(f"{candidate.overrides}: {'fits' if plan.fits else 'does not fit'}")
        plans.append((candidate, plan))
    if not plans and refused is not None:
        raise refused
    return Found(sorted(plans, key=lambda pair: _rank(pair[1])), len(waiting))


def candidates(runs: Sequence[RunConfig], topology: Topology) -> list[Candidate]:
    """All that divides evenly: first what should fit, the fastest by formula first; then the rest by its memory."""
    config, found = runs[0], []
    for mesh in _meshes(runs, topology):
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
                        estimated_seconds(changed, topology, shape),
                        estimated_memory(changed, shape),
                    )
                )
    capacity = topology.capacity

    def promise(candidate: Candidate) -> tuple[bool, float, float]:
        fits = candidate.memory <= capacity
        return (
            (False, candidate.seconds, candidate.memory)
            if fits
            else (True, candidate.memory, candidate.seconds)
        )

    return sorted(found, key=promise)


def estimated_memory(runs: Sequence[RunConfig], shape: dict[str, int]) -> float:
    """Bytes of a device by formula: the state, its gradients and the teacher, and what `memory` estimates."""
    config = runs[0]
    split = shape["fsdp"] * shape["tensor"]
    teacher = online_teacher(config.distill, config.model)
    parameters = sum(count_parameters(run.model).total for run in runs)
    state = 4 * 4 * parameters
    if config.training.accumulation > 1:
        state += 4 * parameters
    if teacher is not None:
        state += (2 if config.distill.dtype == "bfloat16" else 4) * count_parameters(teacher).total
    return state / split + sum(saved_activations(run, shape) for run in runs) + head_blocks(runs, shape)


def estimated_seconds(runs: Sequence[RunConfig], topology: Topology, shape: dict[str, int]) -> float:
    """Of a step by formula: its products, and after them what is sent, which is pessimistic, but orders well.

    Weights are gathered over fsdp for the forward and the backward pass of each microbatch, and gradients summed there;
    four times a layer activations are summed over tensor; keys and values are gathered over sequence.
    """
    chip, config = topology.chip, runs[0]
    teacher = online_teacher(config.distill, config.model)
    devices, width = len(topology.devices), 2 if config.compute.dtype == "bfloat16" else 4
    tokens = config.data.batch_size * config.data.seq_len
    flops = 0.0 if teacher is None else forward_flops_per_token(teacher, config.data.seq_len)
    flops += sum(training_flops_per_token(run.model, config.data.seq_len) for run in runs)
    flops *= tokens * (1 + _RECOMPUTED[config.compute.remat] / 4)
    weights = sum(count_parameters(run.model).total for run in runs) / shape["tensor"]
    gathered = 3 * weights + (0 if teacher is None else count_parameters(teacher).total / shape["tensor"])
    mine = tokens / devices * shape["tensor"]
    sent = gathered * width * config.training.accumulation * _others(shape["fsdp"])
    sent += 2 * 4 * weights / shape["fsdp"] * _others(shape["data"])
    for model in (run.model for run in runs):
        sent += 4 * model.num_layers * mine * model.d_model * width * 2 * _others(shape["tensor"])
        pairs = 2 * model.num_kv_heads * model.head_dim / shape["tensor"] * width * mine * shape["sequence"]
        sent += 3 * model.num_layers * pairs * _others(shape["sequence"])
    return flops / devices / chip.peak_flops + sent / (chip.link_bandwidth * (2 if chip.dimensions else 1))


def _meshes(runs: Sequence[RunConfig], topology: Topology) -> Iterator[MeshConfig]:
    """Every mesh of the devices that divides all models and the teacher.

    Copies across slices stay as configured, or are one a slice.
    """
    config = runs[0]
    replica, devices = max(1, config.mesh.replica), len(topology.devices)
    if topology.platform == "tpu" and replica % topology.slices:
        replica = topology.slices
    models, teacher = [run.model for run in runs], teacher_config(config.distill, config.model)
    if teacher is not None and config.distill.layout is None:  # it lies as the student does
        models.append(teacher)
    for tensor in _divisors(math.gcd(*(model.num_kv_heads for model in models))):
        if any(model.d_ff % tensor or model.vocab_size % tensor for model in models):
            continue
        for sequence in _divisors(_WIDEST_SEQUENCE):
            rest, uneven = divmod(devices, replica * tensor * sequence)
            if uneven:
                continue
            for fsdp in _divisors(rest):
                if all(model.d_model % fsdp == 0 for model in models):
                    yield MeshConfig(rest // fsdp, fsdp, tensor, sequence, replica)


def _rank(plan: Plan) -> tuple[bool, float, int]:
    seconds = plan.bounds.seconds if plan.bounds is not None else 0.0
    return (not plan.fits, seconds, plan.program.memory.peak)


def _others(count: int) -> float:
    """The share of an array that a ring of so many devices sends."""
    return (count - 1) / count


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
