"""The plan of a training step on a topology: its memory, counted cost, and lower bounds on its time.

The step trains one run, or several runs in one program.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma2_jax.methods.method import PARAMS, Method, ModelMethod
from gemma2_jax.model.counts import count_parameters, count_weights
from gemma2_jax.planning.count import ProgramCost, count
from gemma2_jax.planning.hlo import read_program
from gemma2_jax.planning.memory import Parts, memory_parts, memory_savings
from gemma2_jax.planning.program import Program, compile_step, device_bytes, models_in_step, planned_method
from gemma2_jax.planning.roofline import Bounds, bounds, kernel_flops, share_of_peak
from gemma2_jax.planning.topologies import Topology, find_topology
from gemma2_jax.run import RunConfig
from gemma2_jax.training.start import check_built_from, with_prepared_vocabulary

FLOPS_SOURCE = (
    "6 a weight and token (4 a frozen weight), attention by visible pairs, a teacher's forward pass; without "
    "recomputation (PaLM, arXiv 2204.02311, appendix B; Kaplan et al., arXiv 2001.08361, section 2.1)"
)


@dataclass(frozen=True)
class Plan:
    """The plan of a training step. Bytes, FLOPs and costs are per device, except `model_flops`.

    Attributes:
        name: name of the run; the names of several runs are joined by +.
        fits: whether the step fits into the memory of a device.
        mesh: number of devices along each axis.
        program: the compiled step and its memory.
        validating: bytes of frozen weights that only evaluations use: a teacher whose outputs a cache holds.
        collects: whether some steps make their batch by another program, as by sampling, which is not planned.
        parameters: number of parameters of each run's model, by the run's name.
        trained: number of those that are trained; with an adapter, the number of the adapter's.
        parts: memory by content; activations and logits are estimates.
        help: settings that would save memory; empty if the step fits.
        tokens: tokens per step.
        model_flops: FLOPs of a whole step on all devices, by formula.
        cost: cost of the compiled program; None if the compiler produced none.
        kernel_flops: FLOPs of attention by formula, where the program does not contain them.
        bounds: lower bounds on the seconds of a step, an estimate; None without a program.
    """

    name: str
    topology: Topology
    fits: bool
    mesh: dict[str, int]
    program: Program
    validating: int
    collects: bool
    parameters: dict[str, int]
    trained: dict[str, int]
    parts: Parts
    help: list[str]
    tokens: int
    model_flops: float
    cost: ProgramCost | None
    kernel_flops: float
    bounds: Bounds | None

    @property
    def devices(self) -> int:
        return len(self.topology.devices)

    @property
    def utilisation(self) -> float | None:
        """Upper bound on model-FLOP utilisation; None without bounds."""
        if self.bounds is None:
            return None
        return share_of_peak(self.model_flops, self.bounds.seconds, self.devices, self.topology)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        memory = self.program.memory
        found: dict[str, Any] = {
            "name": self.name,
            "topology": self.topology.name,
            "fits": self.fits,
            "devices": self.devices,
            "mesh": self.mesh,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
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
            "not_planned": ["program that makes batches, such as on-policy sampling"]
            if self.collects
            else [],
            "tokens_per_step": self.tokens,
            "model_flops_per_step": self.model_flops,
            "model_flops_source": FLOPS_SOURCE,
            "help": self.help,
        }
        if self.cost is not None and self.bounds is not None:
            found |= {"program_per_device": self._counted(self.cost), "estimate": self._estimate(self.bounds)}
        return found

    def _counted(self, cost: ProgramCost) -> dict[str, Any]:
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
            "kind": "estimate: data-sheet peaks, with all parts fully overlapped; a real step takes longer",
        }


def plan(config: RunConfig, topology: str = "cpu:1", method: ModelMethod | None = None) -> Plan:
    """Plans a training step on devices that need not be present: its memory, communication and minimum time.

    Needs no data. If `data.folder` was prepared with a lowered vocabulary, the plan uses it, as training does.

    Args:
        topology: a name such as `v5e:4x4`, `h100:8` or `cpu:8`, as in `gemma2 plan`.
        method: training method; by default the one that the configuration selects.

    Raises:
        UserError: the topology is unknown, a package for it is missing, the method was built from another
            configuration, or `compile_step` raises.
    """
    if method is not None:
        check_built_from(method, config)
    return make_plan([with_prepared_vocabulary(config)], find_topology(topology), method)


def make_plan(runs: Sequence[RunConfig], topology: Topology, method: Method | None = None) -> Plan:
    """Compiles the training step of `runs` for `topology`, and counts its cost.

    Args:
        runs: the runs that one program trains; a run with a teacher comes first (see `programs_of`).
        method: training method; by default the one that the configurations select.

    Raises:
        UserError: `compile_step` raises.
    """
    config = runs[0]
    if method is None:
        method = planned_method(runs)
    program = compile_step(runs, topology, method)
    shape = dict(program.mesh.shape)
    capacity = topology.capacity
    # The TPU compiler rejects a program that does not fit; the other compilers accept it.
    validating = device_bytes(program.inputs.validating)
    needed = program.memory.peak + validating
    fits = program.text is not None and (
        (topology.platform == "tpu" and not validating) or needed <= capacity
    )
    models = models_in_step(method)
    parts = memory_parts(runs, program.inputs, shape)
    specs = {config.name: method.specs} if len(runs) == 1 else method.specs
    tokens = config.data.batch_size * config.data.seq_len
    cost, in_kernels, least = None, 0.0, None
    if program.text is not None:
        cost = count(read_program(program.text), shape)
        in_kernels = kernel_flops(runs, models, cost, len(topology.devices))
        least = bounds(cost, in_kernels, program.mesh, topology)
    return Plan(
        name=" + ".join(run.name for run in runs),
        topology=topology,
        fits=fits,
        mesh=shape,
        program=program,
        validating=validating,
        collects=any(map(method.collects, range(config.training.steps))),
        parameters={run.name: count_parameters(run.model).total for run in runs},
        trained={run.name: count_weights(specs[run.name][PARAMS]) for run in runs},
        parts=parts,
        help=[] if fits else memory_savings(runs, models, topology, parts, shape, needed - capacity),
        tokens=tokens,
        model_flops=method.flops_per_token * tokens,
        cost=cost,
        kernel_flops=in_kernels,
        bounds=least,
    )
