"""Memory and time of the loss with its gradient, block by block against all logits at once.

    pip install -e '.[tpu]'
    python experiments/benchmarks/loss_memory.py

First what the TPU compiler says of one v5p chip, which does not have to be there: the temporaries of a loss and its
gradient, beyond the inputs and the gradients themselves. Hidden states are bfloat16, the student's embedding and its
gradient float32, as in training; the teacher's embedding is bfloat16. Then time on this machine's CPU, at a size
where all logits fit: both are timed in turns in one run, and the table gives medians and the ratio of each round's.
Without libtpu the first part is left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# Before JAX is imported: libtpu is to compile, and to look for no chip, also beside another process that does so.
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
    """B x T tokens, V rows of the embedding, widths of student and teacher."""

    B: int
    T: int
    V: int
    D: int
    D_teacher: int

    def shapes(self, dtype: Any, sharding: Any = None) -> tuple[Any, ...]:
        """Of the arguments of `loss_and_gradient`: `dtype` for all but the student's embedding and the mask."""

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
    """Of hidden states, embedding, the teacher's two, targets and mask; dense if `block_tokens` is None."""
    config = ObjectiveConfig(*OBJECTIVES[objective], temperature=1.0, block_tokens=block_tokens or 1)
    loss: Any = dense_sums if block_tokens is None else partial(lm_head_sums, block_tokens=block_tokens)

    def total(hidden: Any, embedding: Any, taught: Any, teacher: Any, targets: Any, mask: Any) -> jax.Array:
        heads = {"student": LMHead(hidden, embedding, CAP, PADDING)}
        if config.needs_teacher:
            heads["teacher"] = LMHead(taught, teacher, CAP, PADDING, trained=False)
        coefficients = build_coefficients(config, steps=1)(0)
        per_token = {"targets": targets}
        summed: jax.Array = loss(token_loss(config), heads, per_token, mask, coefficients=coefficients)[0]
        return summed

    return jax.value_and_grad(total, argnums=(0, 1))


def measure_memory(size: Size, blocks: list[int], dense: bool) -> None:
    """Prints the table of temporaries on one TPU chip, or why there is none."""
    try:
        device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    except Exception as error:  # of several types, by what is missing
        reason = (str(error).splitlines() or ["unknown"])[0]
        print(f"No TPU compiler here, so no table of memory: pip install -e '.[tpu]' brings one ({reason}).")
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
    """The compiler's own sentence about it."""
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
            for side, taken in zip(sides, seconds, strict=True):
                begun = time.perf_counter()
                jax.block_until_ready(side(*arguments))
                if number:  # the first compiles
                    taken.append(time.perf_counter() - begun)
        ratios = [blockwise / dense for blockwise, dense in zip(*seconds, strict=True)]
        blockwise, dense = (1e3 * statistics.median(taken) for taken in seconds)
        print(
            f"{objective:20}{blockwise:>16.0f}{dense:>12.0f}{statistics.median(ratios):>8.2f}"
            f"  ({min(ratios):.2f} .. {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the table of memory (8192)")
    parser.add_argument("--vocabulary", type=int, default=256_128, help="its rows of the embedding (256128)")
    parser.add_argument("--widths", type=int, nargs=2, default=[2304, 3584], help="student, teacher")
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024], help="tokens of a block")
    parser.add_argument("--no-dense", action="store_true", help="leave out all logits at once, in that table")
    parser.add_argument("--cpu-tokens", type=int, default=1024, help="of the table of times (1024)")
    parser.add_argument(
        "--cpu-vocabulary", type=int, default=32_768, help="its rows of the embedding (32768)"
    )
    parser.add_argument("--cpu-widths", type=int, nargs=2, default=[256, 384], help="student, teacher")
    parser.add_argument("--cpu-block", type=int, default=512, help="tokens of a block (512)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
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
