"""What a step's memory holds, and which settings would reduce it: exact shard sizes where known, else formulas."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import jax

from gemma2_jax.methods.method import BASE, FrozenModel
from gemma2_jax.model.adaptation import divided_specs
from gemma2_jax.model.config import ComputeConfig, ModelConfig, Remat
from gemma2_jax.model.weights import abstract_params, frozen_dtypes
from gemma2_jax.planning.program import Inputs, device_bytes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig

_FLOAT32 = 4
_UNITS = ((2**30, "GiB"), (2**20, "MiB"))


@dataclass(frozen=True)
class Parts:
    """Memory of one device in bytes, by content.

    Attributes:
        parameters, moments, averaged, base, teacher: exact sizes of the shards. Parameters are the trained ones, the
            base is the frozen part of the trained models.
        parameters_by_run: the share of `parameters` of each run, by the run's name.
        gradients: same as `parameters`, since gradients are sharded like the parameters.
        activations, logits: estimates by formula, see `saved_activations` and `head_blocks`.
    """

    parameters: int
    parameters_by_run: dict[str, int]
    moments: int
    averaged: int
    gradients: int
    base: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum, an estimate of the memory that the step needs."""
        return (
            self.parameters
            + self.moments
            + self.averaged
            + self.gradients
            + self.base
            + self.teacher
            + self.activations
            + self.logits
        )


def memory_parts(runs: Sequence[RunConfig], inputs: Inputs, mesh_shape: dict[str, int]) -> Parts:
    """Returns the memory of one device by content, for a step that trains all `runs`."""
    states = {runs[0].name: inputs.state} if len(runs) == 1 else inputs.state
    by_run = {run.name: device_bytes(states[run.name].trainable) for run in runs}
    parameters = sum(by_run.values())
    return Parts(
        parameters=parameters,
        parameters_by_run=by_run,
        moments=sum(device_bytes(state.optimizer) for state in states.values()),
        averaged=sum(device_bytes(state.averaged) for state in states.values()),
        gradients=parameters,
        base=device_bytes(inputs.frozen[BASE]),
        teacher=device_bytes({name: tree for name, tree in inputs.frozen.items() if name != BASE}),
        activations=sum(saved_activations(run, mesh_shape) for run in runs),
        logits=head_blocks(runs, mesh_shape),
    )


def saved_activations(config: RunConfig, mesh_shape: dict[str, int]) -> int:
    """Estimates the bytes of activations that one device saves for the backward pass.

    Each pair of layers saves its input (`offload` moves it to the host); with `dots` also the results of its products;
    with `none` also the results of norms, rotations, activation functions and residual sums, one array each
    (Korthikanti et al., arXiv 2205.05198, section 4, applied to Gemma's blocks).
    """
    tokens = _device_rows(config, mesh_shape) * config.data.seq_len // shares(config, mesh_shape)[1]
    tensor = mesh_shape.get("tensor", 1)
    return (
        tokens
        * config.model.num_pairs
        * _pair_numbers(config.model, config.compute, tensor)
        * width_of(config.compute.dtype)
    )


def head_blocks(runs: Sequence[RunConfig], mesh_shape: dict[str, int]) -> int:
    """Estimates the bytes of the LM head's logits of one block of tokens, their gradient and the embedding's gradient.

    Each run has its own; the teacher's logits, or its sparse targets made dense, are shared by all runs. A block holds
    the tokens of all devices that share the rows of the vocabulary.
    """
    first = runs[0]
    split = math.prod(mesh_shape.get(axis, 1) for axis in first.layout.head)
    sharing = split // mesh_shape.get("tensor", 1)
    tokens = min(run.objective.block_tokens for run in runs) * sharing
    teacher = _FLOAT32 if any(run.objective.needs_teacher for run in runs) else 0
    blocks = tokens * first.model.vocab_size // split * teacher
    for run in runs:
        blocks += tokens * run.model.vocab_size // split * (_FLOAT32 + width_of(run.compute.dtype))
        if "embedder" in divided_specs(run.adaptation, run.model)[0]:
            blocks += _FLOAT32 * run.model.vocab_size * run.model.d_model // split
    return blocks


def frozen_bytes(run: RunConfig) -> int:
    """Returns the bytes of the frozen part of a run's model on all devices together; 0 if all weights are trained."""
    _, frozen = divided_specs(run.adaptation, run.model)
    leaves = jax.tree.leaves(
        abstract_params(frozen, frozen_dtypes(frozen, run.compute.dtype, run.adaptation.format))
    )
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def memory_savings(
    runs: Sequence[RunConfig],
    models: Collection[FrozenModel],
    topology: Topology,
    parts: Parts,
    mesh_shape: dict[str, int],
    excess: int,
) -> list[str]:
    """Lists settings that would save memory, largest saving first, each with its estimated saving.

    Args:
        runs: the runs that the step trains.
        models: the frozen models that it runs.
        excess: bytes by which the step exceeds the memory of a device.
    """
    config = runs[0]
    savings: list[tuple[int, str]] = []

    def offer(saved: int, change: str) -> None:
        if saved > 0:
            enough = "enough by itself" if saved >= excess else "not enough by itself"
            savings.append(
                (saved, f"{change}: saves about {in_units(saved)} per device (estimate; {enough})")
            )

    policies: tuple[Remat, ...] = ("full", "offload")
    for remat in policies:
        less = [replace(run, compute=replace(run.compute, remat=remat)) for run in runs]
        left = sum(saved_activations(run, mesh_shape) for run in less)
        offer(parts.activations - left, f"compute.remat={remat}")
    rows = _device_rows(config, mesh_shape)
    if rows > 1:
        # Accumulation adds a second copy of the gradients, unless the run accumulates already.
        sums = 0 if config.training.accumulation > 1 else parts.gradients
        offer(
            parts.activations - parts.activations // rows - sums,
            f"training.accumulation={config.training.accumulation * rows}",
        )
    offer(parts.averaged, "training.ema=null")
    whole = parts.parameters + parts.moments + parts.averaged + parts.gradients + parts.base + parts.teacher
    copies = mesh_shape.get("data", 1)
    fsdp = mesh_shape.get("fsdp", 1) * copies
    if copies > 1 and all(run.model.d_model % fsdp == 0 for run in runs):
        offer(
            whole - whole // copies,
            f"mesh.fsdp={fsdp} mesh.data=1 (splits every weight over all devices)",
        )
    if all(run.objective.block_tokens > 128 for run in runs):
        smaller = [replace(run, objective=replace(run.objective, block_tokens=128)) for run in runs]
        offer(parts.logits - head_blocks(smaller, mesh_shape), "objective.block_tokens=128")
    for key in dict.fromkeys(model.dtype_key for model in models if model.dtype == "float32"):
        offer(parts.teacher // 2, f"{key}=bfloat16")
    if config.compute.dtype == "float32":
        offer(parts.activations // 2, "compute.dtype=bfloat16")
    if len(runs) > 1:
        largest = max(runs, key=lambda run: parts.parameters_by_run[run.name])
        # Each parameter also has a gradient and two moments.
        trained = 4 * parts.parameters_by_run[largest.name]
        offer(trained + saved_activations(largest, mesh_shape), f"without --student {largest.name}")
    if rows > 1:
        more = "along mesh.fsdp, for the same batch", parts.activations // 2
    else:
        more = f"along mesh.fsdp, and data.batch_size={2 * config.data.batch_size}", 0
    offer(whole // 2 + more[1], f"twice as many devices as {topology.name} has, {more[0]}")
    return [text for _, text in sorted(savings, reverse=True)]


def shares(config: RunConfig, mesh_shape: dict[str, int]) -> tuple[int, int]:
    """Returns the number of parts into which the mesh splits the rows of a batch, and each sequence."""

    def along(letter: str) -> int:
        axes = config.layout.activations.get(letter, ())
        return math.prod(mesh_shape.get(axis, 1) for axis in axes)

    return along("B"), along("T")


def in_units(size: float) -> str:
    """Formats a number of bytes in GiB, MiB or KiB."""
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (2**10, "KiB"))
    return f"{size / unit:.2f} {name}"


def _device_rows(config: RunConfig, mesh_shape: dict[str, int]) -> int:
    """Returns the number of rows of a microbatch on one device."""
    return max(1, config.data.batch_size // config.training.accumulation // shares(config, mesh_shape)[0])


def width_of(dtype: str) -> int:
    """Returns the bytes of a number."""
    return 2 if dtype == "bfloat16" else _FLOAT32


def _pair_numbers(model: ModelConfig, compute: ComputeConfig, tensor: int) -> int:
    """Returns how many numbers a pair of layers saves per token."""
    D, H, F = model.d_model, model.head_dim, model.d_ff
    if compute.remat == "offload":
        return 0
    if compute.remat == "full":
        return D
    heads = (model.num_heads + 2 * model.num_kv_heads) * H // tensor
    products = heads + D + 2 * F // tensor + D
    if compute.remat == "dots":
        return D + 2 * products
    elementwise = heads + 2 * model.num_heads * H // tensor + 6 * D + 2 * F // tensor
    return D + 2 * (products + elementwise)
