"""The parts of `gpu.py`, each run in a process of its own: `PART SIZE FILE` writes its rows as lines of JSON.

The process is new so that a peak is that of one part: the devices' counters cannot be reset. A measurement that fails
becomes a row with the reason, and the part goes on.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_common import (
    OURS,
    SIZES,
    Figures,
    Report,
    Size,
    peak_bytes,
    run_config,
    seconds_of,
    share_of_flops,
    speed,
    timed,
)
from experiments.benchmarks.gpu_kernels import kernels
from experiments.benchmarks.gpu_transformers import decode_transformers, train_transformers
from gemma2_jax.chips import CHIPS, chip_of_kind
from gemma2_jax.cli.compose import compose
from gemma2_jax.data.batch import Batch
from gemma2_jax.machine import is_installed
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import bytes_per_token, forward_flops_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.quantised import WEIGHT_FORMATS, stored, weight_bytes
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import frozen_dtypes, init_params, map_specs, weight_specs
from gemma2_jax.planning.program import abstract_inputs, compiled, device_bytes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.decoding import row_keys
from gemma2_jax.sampling.generation import Plain, PromptBatch
from gemma2_jax.sampling.sampler import bucket
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.state import Update, initial_state, shardings
from gemma2_jax.training.step import build_train_step


def random_model(config: ModelConfig, format_name: str | None) -> Gemma2:
    """A frozen model with random weights in bfloat16 or in a format, made one by one: the float32 ones do not fit."""
    specs = weight_specs(config)
    format_ = None if format_name is None else WEIGHT_FORMATS[format_name]
    kinds = frozen_dtypes(specs, "bfloat16", format_, whole=format_ is not None)

    def weight(path: str, spec: Any, kind: Any) -> Any:
        return jax.jit(lambda key: stored(init_params(spec, key, path), spec.dims, kind))(jax.random.key(0))

    return Gemma2(config, map_specs(weight, specs, kinds))


# Steps


def train(size: Size, report: Report) -> None:
    report.attempt(f"training step, {size.student}", OURS, lambda: step_figures(size, run_config(size), None))


def distil(size: Size, report: Report) -> None:
    config = run_config(
        size, "objective=distillation", "distill=online", "distill.teacher=random", "distill.dtype=bfloat16"
    )
    sizes = replace(
        compose([f"model={size.teacher}", *size.overrides]).model,
        vocab_size=config.model.vocab_size,
        vocab_padding=config.model.vocab_padding,
    )
    config = replace(config, distill=replace(config.distill, model=sizes))
    name = f"distillation step, {size.student} from {size.teacher}"
    report.attempt(name, OURS, lambda: step_figures(size, config, sizes))


def step_figures(size: Size, config: RunConfig, teacher: ModelConfig | None) -> list[Figures]:
    """Compiles a training step, takes its planned memory, and times it."""
    device = jax.devices()[0]
    mesh = build_mesh(config.mesh, [device])
    with jax.set_mesh(mesh):
        method = build_method(config)
        update = Update(config, method.specs)
        inputs = abstract_inputs(method, update, config, mesh)
        started = time.perf_counter()
        step = build_train_step(method, update, inputs.state, config.layout)
        lowered = step.lower(inputs.state, inputs.frozen, inputs.batch)
        argument = device_bytes((inputs.state, inputs.frozen, inputs.batch))
        planned, _ = compiled(lowered, argument, topology_of(device), "the step")
        program = lowered.compile()  # the same one: JAX keeps it
        compile_seconds = time.perf_counter() - started

        frozen: dict[str, Any] = {}
        if teacher is not None:
            frozen[TEACHER] = jax.device_put(random_model(teacher, None), shardings(inputs.frozen[TEACHER]))
        state, frozen[BASE] = initial_state(config, method, mesh)
        batch = jax.device_put(random_batch(config), shardings(inputs.batch))

        def call() -> Any:
            nonlocal state
            state, metrics = program(state, frozen, batch)
            return state, metrics

        seconds, _ = timed(call, size.steps)
    share = share_of_flops(method.flops_per_token * size.length, seconds, device.device_kind)
    figures = speed(size.length, seconds, share, peak_bytes(), compile_seconds)
    return [figures | {"planned_bytes": planned.peak}]


def topology_of(device: jax.Device) -> Topology:
    """This device as a topology to plan for; the chip's figures are for bounds on the time, which are not computed."""
    chip = chip_of_kind(device.device_kind) or next(iter(CHIPS.values()))
    platform = "cuda" if device.platform == "gpu" else device.platform
    return Topology(device.device_kind, chip, (device,), platform)


def random_batch(config: RunConfig) -> Batch:
    shape = (config.data.batch_size, config.data.seq_len)
    ids = jax.random.randint(jax.random.key(0), shape, 0, config.model.num_tokens)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return Batch(ids, jnp.roll(ids, -1, 1), positions, jnp.ones_like(ids), jnp.ones(shape))


# Generation


def decode(weights_in: str, size: Size, report: Report) -> None:
    name = f"{size.student}, weights in {weights_in}"
    report.attempt(f"generation, {name}", OURS, partial(generation_figures, weights_in, size))


def generation_figures(weights_in: str, size: Size) -> list[Figures]:
    """Times prefill of one prompt, and greedy decoding after it."""
    config = run_config(size)
    model, compute, kind = config.model, config.compute, jax.devices()[0].device_kind
    random = random_model(model, None if weights_in == "bfloat16" else weights_in)
    weights = weight_bytes(random.params())
    decoder = jax.jit(Decoder, static_argnums=1)(random, compute)
    prompts = np.random.default_rng(0).integers(0, model.num_tokens, (1, size.prompt), np.int32)
    keys, no_stop = row_keys(jax.random.key(0), 1), jnp.zeros(0, jnp.int32)
    lengths = np.array([size.prompt], np.int32)
    batch = PromptBatch(prompts, lengths, keys, no_stop, size.new_tokens + 1, TokenChoice())
    generation = Plain(decoder, batch, bucket(batch.positions))

    first, more = [], []  # seconds; both return tokens, so they wait for the device
    for _ in range(size.steps + 1):
        first.append(seconds_of(generation.first))
        more.append(seconds_of(lambda: generation.more(size.new_tokens)))
    prefill, decoding = (statistics.median(each[1:]) for each in (first, more))

    flops = forward_flops_per_token(model, size.prompt) * size.prompt
    peak, chip = peak_bytes(), chip_of_kind(kind)
    read = bytes_per_token(model, weights, size.prompt, jnp.dtype(compute.dtype).itemsize)
    bandwidth = None if chip is None else read * size.new_tokens / decoding / chip.memory_bandwidth
    name = f"{size.student}, weights in {weights_in}"
    compute_share = share_of_flops(flops, prefill, kind)
    return [
        {"name": f"prefill, {name}"} | speed(size.prompt, prefill, compute_share, peak, first[0] - prefill),
        {"name": f"decoding, {name}"} | speed(size.new_tokens, decoding, bandwidth, peak, more[0] - decoding),
    ]


PARTS: dict[str, Callable[[Size, Report], None]] = {
    "kernels": kernels,
    "train": train,
    "train_transformers": train_transformers,
    "distil": distil,
    **{f"decode_{name}": partial(decode, name) for name in ("bfloat16", *WEIGHT_FORMATS)},
    "decode_transformers": decode_transformers,
}


def machine_of(part: str) -> Figures:
    """The device and the versions that a part runs with; nothing about torch if it is not installed."""
    if not part.endswith("_transformers"):
        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    packages = [name for name in ("torch", "transformers") if is_installed(name)]
    return {name: metadata.version(name) for name in packages}


if __name__ == "__main__":
    part, size_name, path = sys.argv[1:]
    PARTS[part](SIZES[size_name], Report(path, machine_of(part)))
