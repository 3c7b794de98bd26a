"""Compares memory and time of the loss and its gradient, computed block-wise and with all logits at once.

    pip install -e '.[tpu]'
    python experiments/benchmarks/loss_memory.py

The first table is memory as computed by the TPU compiler for one v5p chip, without the chip: the temporaries of a loss
and its gradient, in addition to the inputs and the gradients themselves. Hidden states are bfloat16, the student's
embedding and its gradient float32, as in training; the teacher's embedding is bfloat16. The second table is time on
this machine's CPU, at a size where all logits fit: both versions are timed alternately in one process, and the table
gives medians, and the ratios of the rounds. Without libtpu, the first table is left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# Set before JAX is imported: libtpu only compiles, looks for no chip, and may run in several processes at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.objectives.objective import ObjectiveConfig, build_coefficients, token_loss

OBJECTIVES = {"forward_kl": (0.0, 1.0), "cross_entropy": (1.0, 0.0)}
CAP, PADDING = 30.0, 128


@dataclass(frozen=True)
class Size:
    """B x T tokens, V embedding rows, and the widths of student and teacher."""

    B: int
    T: int
    V: int
    D: int
    D_teacher: int

    def shapes(self, dtype: Any, sharding: Any = None) -> tuple[Any, ...]:
        """Returns the shapes for `loss_and_gradient`; float32 student embedding and mask, `dtype` for other floats."""

        def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return (
            array((self.B, self.T, self.D), dtype),
            array((self.V, self.D), jnp.float32),
            array((self.B, self.T, self.D_teacher), dtype),
            array((self.V, self.D_teacher), dtype),
            array((self.B, self.T), jnp.int32),
            array((self.B, self.T), jnp.float32),
        )


def loss_and_gradient(objective: str, block_tokens: int | None) -> Callable[..., Any]:
    """Returns the summed loss and its gradient as a function of the arrays in `Size.shapes`.

    The loss is dense if `block_tokens` is None.
    """
    config = ObjectiveConfig(*OBJECTIVES[objective], temperature=1.0, block_tokens=block_tokens or 1)
    loss: Any = dense_sums if block_tokens is None else partial(lm_head_sums, block_tokens=block_tokens)

    def total(
        hidden: Any, embedding: Any, teacher_hidden: Any, teacher_embedding: Any, targets: Any, mask: Any
    ) -> jax.Array:
        heads = {"model": LMHead(hidden, embedding, CAP, PADDING)}
        if config.needs_teacher:
            heads["teacher"] = LMHead(teacher_hidden, teacher_embedding, CAP, PADDING, trained=False)
        coefficients = build_coefficients(config, steps=1)(0)
        per_token = {"targets": targets}
        summed: jax.Array = loss(token_loss(config), heads, per_token, mask, coefficients=coefficients)[0]
        return summed

    return jax.value_and_grad(total, argnums=(0, 1))


def measure_memory(size: Size, blocks: list[int], dense: bool) -> None:
    """Prints the table of temporaries on one TPU chip, or the reason why it cannot."""
    try:
        device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    except Exception as error:  # the type depends on what is missing
        reason = (str(error).splitlines() or ["unknown"])[0]
        print(
            f"The memory table is left out: there is no TPU compiler ({reason}); pip install -e '.[tpu]' adds one."
        )
        return
    print(f"{size}, compiled for one v5p chip")
    print(f"{'':34}{'temporaries GB':>16}{'inputs GB':>12}{'gradients GB':>14}")
    shapes = size.shapes(jnp.bfloat16, jax.sharding.SingleDeviceSharding(device))
    for objective in OBJECTIVES:
        for block in [*blocks, *([None] if dense else [])]:
            name = f"{objective}, " + ("dense" if block is None else f"block of {block}")
            try:
                compiled = jax.jit(loss_and_gradient(objective, block)).lower(*shapes).compile()
            except jax.errors.JaxRuntimeError as error:
                print(f"{name:34}{'does not fit: ' + out_of_memory(error)}")
                continue
            memory: Any = compiled.memory_analysis()
            figures = [memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes]
            temporaries, inputs, gradients = (figure / 1e9 for figure in figures)
            print(f"{name:34}{temporaries:>16.2f}{inputs:>12.2f}{gradients:>14.2f}")


def out_of_memory(error: Exception) -> str:
    """Returns the compiler's message about memory."""
    lines = [line.strip() for line in str(error).splitlines() if "hbm" in line.lower()]
    return lines[0] if lines else str(error).splitlines()[0]


def measure_time(size: Size, block: int, rounds: int) -> None:
    """Prints the table of times on this machine's CPU."""
    print(f"{size}, float32, block of {block}, on the CPU")
    print(f"{'':20}{'blockwise ms':>16}{'dense ms':>12}{'ratio':>8}  (of each round)")
    keys = iter(jax.random.split(jax.random.key(0), 8))
    arguments = []
    for shape in size.shapes(jnp.float32):
        if shape.dtype == jnp.int32:
            arguments.append(jax.random.randint(next(keys), shape.shape, 0, size.V - PADDING))
        elif len(shape.shape) == 2 and shape.shape[0] == size.B:
            arguments.append(jnp.ones(shape.shape))
        else:
            arguments.append(jax.random.normal(next(keys), shape.shape) * shape.shape[-1] ** -0.25)
    for objective in OBJECTIVES:
        sides = [jax.jit(loss_and_gradient(objective, side)) for side in (block, None)]
        seconds: list[list[float]] = [[], []]
        for number in range(rounds + 1):
            for side, durations in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(side(*arguments))
                if number:  # the first compiles
                    durations.append(time.perf_counter() - start)
        ratios = [blockwise / dense for blockwise, dense in zip(*seconds, strict=True)]
        blockwise, dense = (1e3 * statistics.median(durations) for durations in seconds)
        print(
            f"{objective:20}{blockwise:>16.0f}{dense:>12.0f}{statistics.median(ratios):>8.2f}"
            f"  ({min(ratios):.2f} .. {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens for the memory table (8192)")
    parser.add_argument(
        "--vocabulary", type=int, default=256_128, help="embedding rows for the memory table (256128)"
    )
    parser.add_argument(
        "--widths", type=int, nargs=2, default=[2304, 3584], help="student's and teacher's width"
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024], help="tokens per block")
    parser.add_argument(
        "--no-dense", action="store_true", help="leave the dense loss out of the memory table"
    )
    parser.add_argument("--cpu-tokens", type=int, default=1024, help="tokens for the time table (1024)")
    parser.add_argument(
        "--cpu-vocabulary", type=int, default=32_768, help="embedding rows for the time table (32768)"
    )
    parser.add_argument(
        "--cpu-widths", type=int, nargs=2, default=[256, 384], help="student's and teacher's width"
    )
    parser.add_argument("--cpu-block", type=int, default=512, help="tokens per block (512)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    options = parser.parse_args()

    print(f"jax {jax.__version__}, {os.cpu_count()} cores")
    measure_memory(
        Size(1, options.tokens, options.vocabulary, *options.widths), options.blocks, not options.no_dense
    )
    measure_time(
        Size(1, options.cpu_tokens, options.cpu_vocabulary, *options.cpu_widths),
        options.cpu_block,
        options.rounds,
    )


if __name__ == "__main__":
    main()
