"""What a step of one run, or of several that share it, takes on a topology: compiled, counted, and in one record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma2_jax.distill.teacher import online_teacher
from gemma2_jax.methods.method import Method
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.planning.count import Cost, count
from gemma2_jax.planning.hlo import read_program
from gemma2_jax.planning.memory import Parts, memory_parts, what_helps
from gemma2_jax.planning.program import Program, check_sizes, compile_step, device_bytes
from gemma2_jax.planning.roofline import Bounds, bounds, kernel_flops, share_of_peak
from gemma2_jax.planning.topologies import Topology, find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.training.together import method_of

FLOPS_SOURCE = (
    "6 a weight and token, attention by visible pairs, a teacher's forward pass; without recomputation "
    "(PaLM, arXiv 2204.02311, appendix B; Kaplan et al., arXiv 2001.08361, section 2.1)"
)


@dataclass(frozen=True)
class Plan:
    """What is known of a step before it runs. Bytes, FLOPs and costs are those of one device, but for `model_flops`.

    Attributes:
        name: of the run; the names of several, joined by +.
        fits: whether the compiler placed it into the device's memory.
        mesh: devices along each axis.
        samples: whether the run also samples from the student, by another program, which is not planned.
        validating: bytes of frozen weights that validations take and the step does not: of a teacher beside a cache.
        parameters: of each run's model, by the run's name.
        parts: where the memory goes; activations and logits are estimates.
        help: what would save memory; empty where it fits.
        model_flops: of a whole step on all devices, by formula.
        cost: what the compiled program does; None where there is none.
        kernel_flops: by formula, of attention where the program's count leaves it out.
        bounds: the least seconds of a step, an estimate.
    """

    name: str
    topology: Topology
    fits: bool
    mesh: dict[str, int]
    program: Program
    validating: int
    samples: bool
    parameters: dict[str, int]
    parts: Parts
    help: list[str]
    tokens: int
    model_flops: float
    cost: Cost | None
    kernel_flops: float
    bounds: Bounds | None

    @property
    def devices(self) -> int:
        return len(self.topology.devices)

    @property
    def utilisation(self) -> float | None:
        """The most model-FLOP utilisation that the bounds leave."""
        if self.bounds is None:
            return None
        return share_of_peak(self.model_flops, self.bounds.seconds, self.devices, self.topology)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        memory = self.program.memory
        found: dict[str, Any] = {
            "name": self.name,
            "topology": self.topology.name,
            "fits": self.fits,
            "devices": self.devices,
            "mesh": self.mesh,
            "parameters": self.parameters,
            "memory_per_device": {
                "argument_bytes": memory.argument,
                "temp_bytes": memory.temp,
                "peak_bytes": memory.peak,
                "capacity_bytes": self.topology.capacity,
                "host_bytes": memory.host,
                "validations_teacher_bytes": self.validating,
                "parts": asdict(self.parts),
                "parts_estimated": ["activations", "logits"],
            },
            "compile_seconds": self.program.seconds,
            "not_planned": ["sampling of on-policy steps"] if self.samples else [],
            "tokens_per_step": self.tokens,
            "model_flops_per_step": self.model_flops,
            "model_flops_source": FLOPS_SOURCE,
            "help": self.help,
        }
        if self.cost is not None and self.bounds is not None:
            found |= {"program_per_device": self._counted(self.cost), "estimate": self._estimate(self.bounds)}
        return found

    def _counted(self, cost: Cost) -> dict[str, Any]:
        by_axes: dict[str, dict[str, float]] = {}
        for (kind, axes), amount in cost.sent.items():
            by_axes.setdefault("+".join(axes) or "none", {})[kind] = amount
        return {
            "flops": cost.flops,
            "kernel_flops_by_formula": self.kernel_flops,
            "kernel_calls": dict(cost.kernels),
            "bytes": cost.bytes,
            "collective_bytes_sent": by_axes,
            "loops_without_trip_count": cost.uncounted,
        }

    def _estimate(self, found: Bounds) -> dict[str, Any]:
        return {
            "step_seconds_at_least": found.seconds,
            "bound_by": found.binding,
            "bounds_seconds": found.all,
            "tokens_per_second_at_most": self.tokens / found.seconds,
            "mfu_at_most": self.utilisation,
            "kind": "estimate: peaks from data sheets, all parts at the same time; a real step takes longer",
        }


def plan(config: RunConfig, topology: str = "cpu:1", method: Method | None = None) -> Plan:
    """What a step of a run takes on devices that need not be there: memory, communication, and the least time.

    Args:
        topology: `v5e:4x4`, `h100:8`, `cpu:8` and the like, as in `gemma2 plan`.
        method: what the run learns; by default what the configuration asks for.

    Raises:
        UserError: the topology is not known, a package for it is missing, or what `compile_step` refuses.
    """
    return make_plan([config], find_topology(topology), method)


def make_plan(runs: Sequence[RunConfig], topology: Topology, method: Method | None = None) -> Plan:
    """Compiles a step for `topology`, and counts it.

    Args:
        runs: one, or all that one program trains, with a run first that has a teacher (`programs_of`).
        method: what the runs learn; by default what the configurations ask for.

    Raises:
        UserError: what `compile_step` refuses.
    """
    config = runs[0]
    if method is None:
        for run in runs:
            check_sizes(run)
        method = method_of(runs)
    program = compile_step(runs, topology, method)
    shape = dict(program.mesh.shape)
    capacity = topology.capacity
    # The TPU's compiler itself refuses what does not fit; the others compile it.
    validating = device_bytes(program.inputs.validating)
    needed = program.memory.peak + validating
    fits = program.text is not None and (
        (topology.platform == "tpu" and not validating) or needed <= capacity
    )
    parts = memory_parts(runs, program.inputs, shape)
    tokens = config.data.batch_size * config.data.seq_len
    teacher = online_teacher(config.distill, config.model)
    cost, in_kernels, least = None, 0.0, None
    if program.text is not None:
        cost = count(read_program(program.text), shape)
        in_kernels = kernel_flops(runs, teacher, cost, len(topology.devices))
        least = bounds(cost, in_kernels, program.mesh, topology)
    return Plan(
        name=" + ".join(run.name for run in runs),
        topology=topology,
        fits=fits,
        mesh=shape,
        program=program,
        validating=validating,
        samples=config.distill.on_policy is not None,
        parameters={run.name: count_parameters(run.model).total for run in runs},
        parts=parts,
        help=[] if fits else what_helps(runs, topology, parts, shape, needed - capacity),
        tokens=tokens,
        model_flops=method.flops_per_token * tokens,
        cost=cost,
        kernel_flops=in_kernels,
        bounds=least,
    )
