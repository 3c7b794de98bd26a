"""The plan of generation on a topology: memory, and lower bounds on the time, of prefill and of decoding one token.

Weights are in `compute.dtype`, or quantised; the cache is full, and in `compute.dtype` or int8.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gemma2_jax.config import UserError
from gemma2_jax.kernels.int8_vectors import SCALE_BYTES
from gemma2_jax.model.cache import Cache
from gemma2_jax.model.counts import bytes_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.quantised import Format
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, dim_sizes, frozen_dtypes, weight_specs
from gemma2_jax.planning.count import ProgramCost, count
from gemma2_jax.planning.hlo import read_program
from gemma2_jax.planning.program import Memory, compiled, device_bytes, for_topology
from gemma2_jax.planning.roofline import Bounds, attention_flops_per_token, bounds
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import (
    batch_shares,
    check_activations,
    laid_out,
    layout_in_use,
    sequence_shares,
)
from gemma2_jax.sharding.mesh import build_mesh

_MOST_POSITIONS = 2**30  # far more than devices hold, and few enough for the compiler's sizes


@dataclass(frozen=True)
class Phase:
    """Prefill of all prompts, or decoding of one token for each row. Bytes and costs are per device.

    Attributes:
        tokens: tokens of all rows that it processes.
        seconds: time of compiling.
        cost: cost of the compiled program; None if it does not fit.
        bounds: lower bounds on its seconds; None if it does not fit.
    """

    memory: Memory
    tokens: int
    seconds: float
    cost: ProgramCost | None
    bounds: Bounds | None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "memory_per_device": {
                "argument_bytes": self.memory.argument,
                "temp_bytes": self.memory.temp,
                "peak_bytes": self.memory.peak,
            },
            "compile_seconds": self.seconds,
        }
        if self.cost is not None and self.bounds is not None:
            found |= {
                "flops": self.cost.flops,
                "bytes": self.cost.bytes,
                "loops_without_trip_count": self.cost.uncounted,
                "bounds_seconds": self.bounds.all,
                "bound_by": self.bounds.binding,
                "seconds_at_least": self.bounds.seconds,
                "tokens_per_second_at_most": self.tokens / self.bounds.seconds,
            }
        return found


@dataclass(frozen=True)
class DecodingPlan:
    """The plan of generation with one model. Bytes are per device.

    Attributes:
        name: of the run whose model it is.
        weights_in: dtype or format of the matrices.
        cache_in: dtype of keys and values; int8 has a float32 scale for each vector.
        weights: bytes of the weights; cache: bytes of keys and values.
        ideal: bytes that a decoded token must read at least: weights and cache once (`model.counts`).
    """

    name: str
    topology: Topology
    mesh: dict[str, int]
    weights_in: str
    cache_in: str
    batch: int
    context: int
    weights: int
    cache: int
    ideal: int
    prefill: Phase
    decode: Phase

    @property
    def fits(self) -> bool:
        """Whether both phases fit into the memory of a device."""
        phases = (self.prefill, self.decode)
        return all(
            phase.bounds is not None and phase.memory.peak <= self.topology.capacity for phase in phases
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        names = ("name", "mesh", "weights_in", "cache_in", "batch", "context", "weights", "cache", "ideal")
        plain = {name: getattr(self, name) for name in names}
        plain |= {"prefill": self.prefill.to_dict(), "decode": self.decode.to_dict()}
        return plain | {
            "topology": self.topology.name,
            "capacity_bytes": self.topology.capacity,
            "fits": self.fits,
            "kind": "times are estimates: data-sheet peaks, with all parts fully overlapped",
        }


def plan_decoding(
    config: RunConfig,
    topology: Topology,
    batch: int,
    context: int,
    format_: Format | None = None,
    cache_dtype: str | None = None,
) -> DecodingPlan:
    """Compiles prefill and decoding of the run's model for a topology, and counts their costs.

    Args:
        batch: rows; context: positions of each row, all of which prefill fills.
        format_: format of all matrices; None for arrays of compute.dtype.
        cache_dtype: as in `Decoder`.

    Raises:
        UserError: the mesh divides neither model nor batch, or compilation fails for a reason other than memory.
    """
    if min(batch, context) < 1:
        raise UserError(f"--batch is {batch} and --context is {context}; both must be at least 1.")
    if batch * context > _MOST_POSITIONS:
        raise UserError(
            f"--batch is {batch} and --context is {context}; their product must be at most {_MOST_POSITIONS}."
        )
    model, compute, mesh = config.model, config.compute, build_mesh(config.mesh, topology.devices)
    specs = weight_specs(model)
    with laid_out(config.layout):
        check_activations(mesh, dim_sizes(model))
        _check_split(batch, mesh)
        kinds = frozen_dtypes(specs, compute.dtype, format_, whole=format_ is not None)
        params = abstract_params(specs, kinds, mesh)

    def decoder(params: Any) -> Decoder:
        return Decoder(Gemma2(model, params), compute, cache_dtype)

    def prefill(params: Any, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        # Constant lengths: the compiled program then states how many chunks it runs, and all of them are counted.
        lengths = jnp.full((batch,), context, jnp.int32)
        return decoder(params).prefill(tokens, lengths, context)

    def decode(params: Any, tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return decoder(params).decode(tokens, position, cache)

    with for_topology(config, mesh, topology):
        prompts, numbers = _placed(mesh, (batch, context), "BT"), _placed(mesh, (batch,), "B")
        shapes = jax.eval_shape(prefill, params, prompts)[1]
        cache = jax.tree.map(
            lambda leaf: _placed(mesh, leaf.shape, _CACHE_DIMS[leaf.ndim], leaf.dtype), shapes
        )
        attention = attention_flops_per_token(model, context) * batch * context / mesh.size
        first = _phase(prefill, (params, prompts), (), batch * context, topology, mesh, attention)
        token = _phase(decode, (params, numbers, numbers, cache), (3,), batch, topology, mesh, 0.0)
    weights, held = device_bytes(params), device_bytes(cache)
    cache_in = cache_dtype or compute.dtype
    scale = SCALE_BYTES if cache_in == "int8" else 0
    one_row = bytes_per_token(model, 0, context, jnp.dtype(cache_in).itemsize, scale)
    return DecodingPlan(
        name=config.name,
        topology=topology,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        weights_in=compute.dtype if format_ is None else format_.name,
        cache_in=cache_in,
        batch=batch,
        context=context,
        weights=weights,
        cache=held,
        ideal=weights + one_row * batch // mesh.size,
        prefill=first,
        decode=token,
    )


_CACHE_DIMS = {5: "PBKSH", 4: "PBKS", 2: "BS"}  # numbers, their scales and positions


def _check_split(batch: int, mesh: Mesh) -> None:
    """Raises UserError if the mesh does not divide the rows, or splits sequences, of which decoding has one token."""
    shares = batch_shares(mesh)
    if batch % shares:
        raise UserError(
            f"--batch is {batch} rows, which mesh.replica x mesh.data x mesh.fsdp = {shares} does not divide; choose a "
            f"multiple of {shares}, or mesh.tensor."
        )
    if sequence_shares(mesh) > 1:
        raise UserError(
            "mesh.sequence is above 1, but a decoded token cannot be split; write mesh.sequence=1."
        )


def _phase(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    donated: tuple[int, ...],
    tokens: int,
    topology: Topology,
    mesh: Mesh,
    attention: float,
) -> Phase:
    """Compiles a function; `attention` is its FLOPs of attention on one device by formula, for kernels."""
    started = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donated).lower(*inputs)
    memory, text = compiled(lowered, device_bytes(inputs), topology, function.__name__)
    seconds, cost, least = time.perf_counter() - started, None, None
    if text is not None:
        cost = count(read_program(text), dict(mesh.shape))
        least = bounds(cost, attention if cost.kernels or cost.uncounted else 0.0, mesh, topology)
    return Phase(memory, tokens, seconds, cost, least)


def _placed(mesh: Mesh, shape: tuple[int, ...], dims: str, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, layout_in_use().spec(dims)))
