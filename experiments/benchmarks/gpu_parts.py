"""The parts of `gpu.py`, each run in a process of its own: `PART SIZE FILE` writes its rows as lines of JSON.

The process is new so that a peak is that of one part: the devices' counters cannot be reset.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gpu_kernels import comparisons
from shared import (
    TheirTraining,
    median_seconds,
    our_generation,
    random_batch,
    their_generation,
    their_model,
)

from gemma2_jax.chips import CHIPS, chip_of_kind
from gemma2_jax.cli.compose import compose
from gemma2_jax.config import UserError
from gemma2_jax.messages import one_line
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import bytes_per_token, forward_flops_per_token
from gemma2_jax.model.quantised import WEIGHT_FORMATS, stored, weight_bytes
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import frozen_dtypes, init_params, map_specs, weight_specs
from gemma2_jax.planning.program import abstract_inputs, compiled, device_bytes
from gemma2_jax.planning.topologies import Topology
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.state import Update, initial_state, shardings
from gemma2_jax.training.step import build_train_step

OURS, THEIRS = "gemma2_jax", "transformers"
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        student, teacher: models. The student is what the training step trains and generation runs.
        length: tokens of a training step, in one sequence.
        prompt, new_tokens: tokens of prefill, and of decoding after it.
        kernel_length, window: tokens of each row in `kernels`, and the window of local attention.
        repetitions: timed ones.
    """

    student: str
    teacher: str
    overrides: tuple[str, ...]
    length: int
    prompt: int
    new_tokens: int
    kernel_length: int
    window: int
    repetitions: int

    def config(self, *overrides: str) -> RunConfig:
        settings = ("compute=bfloat16", "data=files", "data.source=none", "training=long", "mesh=data")
        data = (f"data.seq_len={self.length}", "data.batch_size=1")
        return compose([f"model={self.student}", *self.overrides, *settings, *data, *overrides])


SIZES = {
    "2b": Size("gemma2_2b", "gemma2_9b", (), 8192, 1024, 64, 1024, 256, 5),
    "toy": Size("toy", "toy", ("tokenizer.vocab_size=512",), 32, 16, 64, 160, 100, 3),
}


def main() -> None:
    part, name, path = sys.argv[1:]
    size = SIZES[name]
    with open(path, "w", buffering=1) as file:
        try:
            for row in PARTS[part](size):
                file.write(json.dumps({"part": part, **row}) + "\n")
        except Exception as error:  # of any library
            file.write(json.dumps({"part": part, **failure(part, error)}) + "\n")


def failure(name: str, error: Exception) -> Row:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return {"name": name, "failure": kind + one_line(error)}


def machine(_: Size) -> Iterator[Row]:
    device = jax.devices()[0]
    yield {"device": device.device_kind, "platform": device.platform}


def kernels(size: Size) -> Iterator[Row]:
    for name, compare in comparisons(size.config().model, size.kernel_length, size.window, size.repetitions):
        try:
            yield {"name": name, **compare()}
        except Exception as error:  # the other kernels are worth having
            yield failure(name, error)


# Steps


def train(size: Size) -> Iterator[Row]:
    yield {"name": f"training step, {size.student}", **step_figures(size.config(), size.repetitions)}


def distil(size: Size) -> Iterator[Row]:
    keys = ("objective=distillation", "distill=online", "distill.teacher=random", "distill.dtype=bfloat16")
    config, teacher = size.config(*keys), compose([f"model={size.teacher}", *size.overrides]).model
    config = replace(config, distill=replace(config.distill, model=teacher))
    name = f"distillation step, {size.student} from {size.teacher}"
    yield {"name": name, **step_figures(config, size.repetitions)}


def step_figures(config: RunConfig, repetitions: int) -> Row:
    """Compiles a step, takes its planned memory, and times it.

    Raises:
        UserError: it does not fit into the device's memory.
    """
    device = jax.devices()[0]
    mesh = build_mesh(config.mesh, [device])
    with jax.set_mesh(mesh):
        method = build_method(config)
        update = Update(config, method.specs)
        inputs = abstract_inputs(method, update, config, mesh)
        argument = device_bytes((inputs.state, inputs.frozen, inputs.batch))
        check_fits(argument)
        start = time.perf_counter()
        step = build_train_step(method, update, inputs.state, config.layout)
        lowered = step.lower(inputs.state, inputs.frozen, inputs.batch)
        planned, _ = compiled(lowered, argument, topology_of(device), "the step")
        check_fits(planned.peak)
        program = lowered.compile()  # the same one: JAX keeps it
        compile_seconds = time.perf_counter() - start

        frozen: dict[str, Any] = {}
        for name, model in method.frozen_models.items():
            dtypes = map_specs(lambda *_: jnp.dtype(config.distill.dtype), weight_specs(model.config))
            frozen[name] = jax.device_put(random_model(model.config, dtypes), shardings(inputs.frozen[name]))
        state, frozen[BASE] = initial_state(config, method, mesh)
        ids = random_batch(config.data.batch_size, config.data.seq_len, config.model.num_tokens)
        batch = jax.device_put(ids, shardings(inputs.batch))

        def call() -> None:
            nonlocal state
            state, metrics = program(state, frozen, batch)
            jax.block_until_ready((state, metrics))

        seconds = median_seconds(call, repetitions)
    tokens = config.data.batch_size * config.data.seq_len
    share = share_of_flops(method.flops_per_token * tokens, seconds, device.device_kind)
    row = speed(OURS, tokens, seconds, share, our_peak())
    return row | {"planned_bytes": planned.peak, "compile_seconds": compile_seconds}


def check_fits(needed: int) -> None:
    """Raises UserError if the device has fewer bytes for JAX; a CPU does not count them."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", needed)
    if needed > limit:
        raise UserError(f"skipped: it needs {needed / 1e9:.1f} GB, and JAX may use {limit / 1e9:.1f} GB")


def topology_of(device: jax.Device) -> Topology:
    """This device as a topology to plan for. The chip's figures are for bounds on the time, which are not computed."""
    chip = chip_of_kind(device.device_kind) or next(iter(CHIPS.values()))
    platform = "cuda" if device.platform == "gpu" else device.platform
    return Topology(device.device_kind, chip, (device,), platform)


def random_model(config: ModelConfig, kinds: Any) -> Gemma2:
    """A model with random weights in dtypes or formats, made one by one: all in float32 would not fit."""

    def weight(path: str, spec: Any, kind: Any) -> Any:
        return jax.jit(lambda key: stored(init_params(spec, key, path), spec.dims, kind))(jax.random.key(0))

    return Gemma2(config, map_specs(weight, weight_specs(config), kinds))


def train_transformers(size: Size) -> Iterator[Row]:
    import torch

    config = size.config()
    model = their_model(config.model, "bfloat16", their_device(size))
    model.gradient_checkpointing_enable()  # as compute=bfloat16 does
    ids = torch.randint(0, config.model.num_tokens, (1, size.length), device=model.device)
    training = TheirTraining(model, ids, ids, learning_rate=1e-4, weight_decay=0.1)

    def step() -> None:
        training.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = median_seconds(step, size.repetitions)
    flops = build_method(config).flops_per_token * size.length
    share = share_of_flops(flops, seconds, their_kind())
    yield {
        "name": f"training step, {size.student}",
        **speed(THEIRS, size.length, seconds, share, their_peak()),
    }


# Generation


def decode(weights_in: str, size: Size) -> Iterator[Row]:
    config = size.config()
    format_ = WEIGHT_FORMATS.get(weights_in)
    kinds = frozen_dtypes(weight_specs(config.model), "bfloat16", format_, whole=format_ is not None)
    model = random_model(config.model, kinds)
    generate = our_generation(model, config.compute)
    kind, weights = jax.devices()[0].device_kind, weight_bytes(model.params())
    yield from generation_rows(size, OURS, weights_in, generate, kind, our_peak, weights)


def decode_transformers(size: Size) -> Iterator[Row]:
    generate = their_generation(model := their_model(size.config().model, "bfloat16", their_device(size)))
    weights = sum(weight.nbytes for weight in model.parameters())
    yield from generation_rows(size, THEIRS, "bfloat16", generate, their_kind(), their_peak, weights)


def generation_rows(
    size: Size,
    engine: str,
    weights_in: str,
    generate: Callable[[list[int], int], list[int]],
    kind: str,
    peak: Callable[[], int | None],
    weights: int,
) -> Iterator[Row]:
    """Yields the rows of prefill with one token, and of the further tokens: their time is a difference.

    Args:
        kind: of the device; weights: their bytes.
    """
    model, prompt = size.config().model, list(range(size.prompt))
    prefill = median_seconds(partial(generate, prompt, 1), size.repetitions)
    share = share_of_flops(forward_flops_per_token(model, size.prompt) * size.prompt, prefill, kind)
    name = f"{size.student}, weights in {weights_in}"
    yield {"name": f"prefill, {name}", **speed(engine, size.prompt, prefill, share, peak())}

    decoding = median_seconds(partial(generate, prompt, size.new_tokens + 1), size.repetitions) - prefill
    if decoding <= 0:  # on a busy machine, with a tiny model
        yield {"name": f"decoding, {name}", "failure": "the time is too short to be measured"}
        return
    chip = chip_of_kind(kind)
    read = bytes_per_token(model, weights, size.prompt, width=2) * size.new_tokens
    share = None if chip is None else read / decoding / chip.memory_bandwidth
    yield {"name": f"decoding, {name}", **speed(engine, size.new_tokens, decoding, share, peak())}


# Devices


def speed(engine: str, tokens: int, seconds: float, share: float | None, peak: int | None) -> Row:
    return {
        "engine": engine,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "share": share,
        "peak_bytes": peak,
    }


def share_of_flops(flops: float, seconds: float, kind: str) -> float | None:
    """Share of the peak FLOPs of a device of this kind; None if its peak is unknown."""
    chip = chip_of_kind(kind)
    return None if chip is None else flops / seconds / chip.peak_flops


def our_peak() -> int | None:
    """Most bytes that JAX has allocated on the device; None on a CPU, which does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def their_peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def their_kind() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def their_device(size: Size) -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if size is SIZES["toy"]:
        return "cpu"
    raise UserError("torch finds no GPU")


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "machine": machine,
    "kernels": kernels,
    "train": train,
    "train_transformers": train_transformers,
    "distil": distil,
    "decode_bfloat16": partial(decode, "bfloat16"),
    "decode_int8": partial(decode, "int8"),
    "decode_int4": partial(decode, "int4"),
    "decode_transformers": decode_transformers,
}


if __name__ == "__main__":
    main()
