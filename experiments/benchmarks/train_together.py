"""What three students cost together, against three runs: seconds a step, in turns.

    python experiments/benchmarks/train_together.py

A teacher (--teacher, small_6m) and three students (--student, small_1m) with random weights, batches of the size
of --batch x 128 tokens of random ids. One side lets the teacher read the batch once and hands what it said to three
compiled steps; the other compiles one step with the teacher in it and takes it three times. Both are timed in turns in
one process; the table gives medians, and the ratio of each round's. Beside them, what no teacher at all takes.
"""

import argparse
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.cli.compose import compose
from gemma2_jax.data.batch import Batch
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.optimizer import build_optimizer
from gemma2_jax.training.state import abstract_state, init_state
from gemma2_jax.training.step import build_reading, build_train_step

STUDENTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="small_6m", help="model of the teacher (small_6m)")
    parser.add_argument("--student", default="small_1m", help="model of the students (small_1m)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch (8)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores, {options.teacher} teaches {STUDENTS} {options.student}"
    )

    given = [f"model={options.student}", "objective=distillation", "distill=online", "distill.teacher=none"]
    config = compose([*given, f"data.batch_size={options.batch}", "mesh.data=1"])
    teacher_config = compose([f"model={options.teacher}"]).model
    shape = (options.batch, config.data.seq_len)
    ids = jax.random.randint(jax.random.key(0), shape, 0, config.model.num_tokens)
    places = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    batch = Batch(ids, jnp.roll(ids, -1, 1), places, jnp.ones_like(ids), jnp.ones(shape))
    mesh = build_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        optimizer = build_optimizer(config.optimizer, config.training.steps)
        abstract = abstract_state(config.model, optimizer, mesh)
        teacher = Gemma2.init(teacher_config, jax.random.key(1))
        step = build_train_step(config, optimizer, abstract)
        read = build_reading(config.compute, config.distill, None)
        states = [init_state(config.model, optimizer, abstract, seed) for seed in range(STUDENTS)]
        text = compose([f"model={options.student}", f"data.batch_size={options.batch}", "mesh.data=1"])
        plain = build_train_step(text, optimizer, abstract)

        def together() -> None:
            taught = read(teacher, batch)
            for number in range(STUDENTS):
                states[number], _ = step(states[number], teacher, batch, taught)

        def one_by_one() -> None:
            for number in range(STUDENTS):
                states[number], _ = step(states[number], teacher, batch)

        def without_teacher() -> None:
            for number in range(STUDENTS):
                states[number], _ = plain(states[number], None, batch)

        sides: dict[str, Any] = {
            "together": together,
            "one by one": one_by_one,
            "without a teacher": without_teacher,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                begun = time.perf_counter()
                side()
                jax.block_until_ready(states)
                if number:  # the first compiles
                    seconds[name].append(time.perf_counter() - begun)
    print(f"{'':24}{'ms a step of all':>18}{'of one by one':>16}")
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["one by one"], strict=True)]
        print(f"{name:24}{1e3 * statistics.median(taken):>18.1f}{statistics.median(ratios):>16.2f}")


if __name__ == "__main__":
    main()
