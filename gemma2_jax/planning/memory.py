"""Where a step's memory goes, and what would make it less: sizes of shards where they are known, else by formula."""

import math
from dataclasses import dataclass, replace

from gemma2_jax.model.config import ComputeConfig, ModelConfig, Remat
from gemma2_jax.planning.program import Inputs, device_bytes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig

_FLOAT32 = 4
_UNITS = ((2**30, "GiB"), (2**20, "MiB"))


@dataclass(frozen=True)
class Parts:
    """Bytes of one device by what they hold.

    Attributes:
        parameters, moments, teacher: exact, from their shards. Gradients lie as the parameters do.
        activations, logits: estimates by formula, see `saved_activations` and `head_blocks`.
    """

    parameters: int
    moments: int
    gradients: int
    teacher: int
    activations: int
    logits: int


def memory_parts(config: RunConfig, inputs: Inputs, mesh_shape: dict[str, int]) -> Parts:
    """The parts of one device's memory."""
    parameters = device_bytes(inputs.state.trainable)
    return Parts(
        parameters=parameters,
        moments=device_bytes(inputs.state.optimizer),
        gradients=parameters,
        teacher=device_bytes(inputs.frozen),
        activations=saved_activations(config, mesh_shape),
        logits=head_blocks(config, mesh_shape),
    )


def saved_activations(config: RunConfig, mesh_shape: dict[str, int]) -> int:
    """What the backward pass finds of the forward pass, an estimate.

    Of each pair of layers its input, which `offload` keeps elsewhere; with `dots` also the results of its products;
    with `none` also those of norms, rotations, activation functions and residual sums, one array each (Korthikanti et
    al., arXiv 2205.05198, section 4, counted for Gemma's blocks).
    """
    tokens = _device_rows(config, mesh_shape) * config.data.seq_len // shares(config, mesh_shape)[1]
    tensor = mesh_shape.get("tensor", 1)
    return (
        tokens * config.model.num_pairs * _pair_numbers(config.model, config.compute, tensor) * _width(config)
    )


def head_blocks(config: RunConfig, mesh_shape: dict[str, int]) -> int:
    """The LM head's logits of one block of tokens, their gradient, and the embedding's gradient: an estimate.

    Tokens of a block are those of all devices that share the vocabulary's rows.
    """
    split = math.prod(mesh_shape.get(axis, 1) for axis in config.layout.head)
    sharing = split // mesh_shape.get("tensor", 1)
    logits = config.objective.block_tokens * sharing * config.model.vocab_size // split
    teacher = _FLOAT32 if config.objective.needs_teacher else 0
    gradient = _FLOAT32 * config.model.vocab_size * config.model.d_model // split
    return logits * (_FLOAT32 + _width(config) + teacher) + gradient


def what_helps(
    config: RunConfig, topology: Topology, parts: Parts, mesh_shape: dict[str, int], excess: int
) -> list[str]:
    """What would save memory, the largest saving first, each with its estimate; `excess` is what there is too much."""
    savings: list[tuple[int, str]] = []

    def offer(saved: int, words: str) -> None:
        if saved > 0:
            enough = "enough by itself" if saved >= excess else "not enough by itself"
            savings.append((saved, f"{words}: some {in_units(saved)} less a device ({enough}, an estimate)"))

    policies: tuple[Remat, ...] = ("full", "offload")
    for remat in policies:
        less = replace(config, compute=replace(config.compute, remat=remat))
        offer(parts.activations - saved_activations(less, mesh_shape), f"compute.remat={remat}")
    rows = _device_rows(config, mesh_shape)
    if rows > 1:
        # A batch cut into more parts adds a second copy of the gradients, unless there is one already.
        sums = 0 if config.training.accumulation > 1 else parts.gradients
        offer(
            parts.activations - parts.activations // rows - sums,
            f"training.accumulation={config.training.accumulation * rows}",
        )
    whole = parts.parameters + parts.moments + parts.gradients + parts.teacher
    copies = mesh_shape.get("data", 1)
    fsdp = mesh_shape.get("fsdp", 1) * copies
    if copies > 1 and config.model.d_model % fsdp == 0:
        offer(
            whole - whole // copies,
            f"mesh.fsdp={fsdp} mesh.data=1 (every weight split over all devices)",
        )
    if config.objective.block_tokens > 128:
        smaller = replace(config, objective=replace(config.objective, block_tokens=128))
        offer(parts.logits - head_blocks(smaller, mesh_shape), "objective.block_tokens=128")
    if teacher_is_float32(config):
        offer(parts.teacher // 2, "distill.dtype=bfloat16")
    if config.compute.dtype == "float32":
        offer(parts.activations // 2, "compute.dtype=bfloat16")
    if rows > 1:
        more = "along mesh.fsdp, for the same batch", parts.activations // 2
    else:
        more = f"along mesh.fsdp, and data.batch_size={2 * config.data.batch_size}", 0
    offer(whole // 2 + more[1], f"twice as many devices as {topology.name} has, {more[0]}")
    return [words for _, words in sorted(savings, reverse=True)]


def teacher_is_float32(config: RunConfig) -> bool:
    """Whether there is an online teacher that could be halved."""
    return (
        config.distill.teacher is not None
        and config.distill.cache is None
        and config.distill.dtype == "float32"
    )


def shares(config: RunConfig, mesh_shape: dict[str, int]) -> tuple[int, int]:
    """Into how many parts the mesh splits rows, and each sequence."""

    def along(letter: str) -> int:
        axes = config.layout.activations.get(letter, ())
        return math.prod(mesh_shape.get(axis, 1) for axis in axes)

    return along("B"), along("T")


def in_units(size: float) -> str:
    """Bytes with the unit that suits them: GiB, MiB or KiB."""
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (2**10, "KiB"))
    return f"{size / unit:.2f} {name}"


def _device_rows(config: RunConfig, mesh_shape: dict[str, int]) -> int:
    """Rows of a microbatch that one device works on."""
    return max(1, config.data.batch_size // config.training.accumulation // shares(config, mesh_shape)[0])


def _width(config: RunConfig) -> int:
    return 2 if config.compute.dtype == "bfloat16" else _FLOAT32


def _pair_numbers(model: ModelConfig, compute: ComputeConfig, tensor: int) -> int:
    """Numbers that are kept of a pair of layers for each token."""
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
