"""What three students cost together, against three runs: seconds a step in turns, and memory.

    python experiments/benchmarks/train_together.py

A teacher (--teacher, small_6m) and three students (--student, small_1m) with random weights, batches of the size
of --batch x 128 tokens of random ids. One side compiles one step for all three, with one forward pass of the teacher;
the other compiles one step with the teacher in it and takes it three times. Both are timed in turns in one process; the
table gives medians, the ratio of each round's, and what the arguments and temporaries of a program take. Beside them,
what no teacher at all takes.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from gemma2_jax.cli.compose import compose
from gemma2_jax.data.batch import Batch
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.method import BASE, Method
from gemma2_jax.methods.students import Students
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.state import Update, initial_state
from gemma2_jax.training.step import build_train_step
from gemma2_jax.training.together import Updates

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
        sizes = replace(teacher_config, vocab_size=config.model.vocab_size)
        student = replace(config, distill=replace(config.distill, model=sizes))
        frozen = {TEACHER: Gemma2.init(sizes, jax.random.key(1))}
        text = compose([f"model={options.student}", f"data.batch_size={options.batch}", "mesh.data=1"])
        names = [f"student{number}" for number in range(STUDENTS)]
        students = Students({name: build_method(student) for name in names})
        updates = Updates({name: Update(student, students.members[name].specs) for name in names})
        abstract = {
            name: Update(student, students.members[name].specs).abstract_state(mesh) for name in names
        }
        together = compiled(students, updates, abstract, student, mesh)
        alone = {each.name: compiled_alone(each, mesh) for each in (student, replace(text, name="text"))}

        def initial_states(config: RunConfig) -> dict[str, Any]:
            method = build_method(config)
            return {
                name: initial_state(replace(config, seed=seed), method, mesh)[0]
                for seed, name in enumerate(names)
            }

        of_all, of_each, of_text = initial_states(student), initial_states(student), initial_states(text)
        for_all = {**frozen, BASE: {name: {} for name in names}}

        def step_together() -> None:
            nonlocal of_all
            of_all, _ = together(of_all, for_all, batch)

        def one_by_one() -> None:
            for name in names:
                of_each[name], _ = alone[student.name](of_each[name], {**frozen, BASE: {}}, batch)

        def without_teacher() -> None:
            for name in names:
                of_text[name], _ = alone["text"](of_text[name], {BASE: {}}, batch)

        sides: dict[str, Any] = {
            "together": step_together,
            "one by one": one_by_one,
            "without a teacher": without_teacher,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        memory = {"together": together, "one by one": alone[student.name], "without a teacher": alone["text"]}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                jax.block_until_ready((of_all, of_each, of_text))
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
    print(f"{'':24}{'ms a step of all':>18}{'of one by one':>16}{'MiB of a program':>18}")
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["one by one"], strict=True)]
        columns = f"{1e3 * statistics.median(taken):>18.1f}{statistics.median(ratios):>16.2f}"
        print(f"{name:24}{columns}{mebibytes(memory[name]):>18,.0f}")


def compiled_alone(config: RunConfig, mesh: Mesh) -> Compiled:
    method = build_method(config)
    update = Update(config, method.specs)
    return compiled(method, update, update.abstract_state(mesh), config, mesh)


def compiled(method: Method, update: Any, abstract: Any, config: RunConfig, mesh: Mesh) -> Compiled:
    """A method's training step."""
    step = build_train_step(method, update, abstract, config.layout)
    return step.lower(abstract, method.abstract_frozen(mesh), method.abstract_batch(mesh)).compile()


def mebibytes(program: Compiled) -> float:
    """What its arguments and temporaries take."""
    found: Any = program.memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**20


if __name__ == "__main__":
    main()
