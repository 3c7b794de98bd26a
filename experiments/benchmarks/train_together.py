"""Compares students trained together, as by `gemma2 sweep --together`, with separate runs: time per step, and memory.

    python experiments/benchmarks/train_together.py

A teacher (--teacher, small_6m) and --students students (--student, small_1m) have random weights; batches are
--batch x 128 random ids. "together" is one compiled step for all students, with one forward pass of the teacher. "one
by one" is one compiled step with the teacher in it, executed once for each student. "without a teacher" is as many
steps on text. All are timed alternately in one process. The table gives medians, median ratios to "one by one", and the
memory of a program's arguments and temporaries.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled
from shared import random_batch

from gemma2_jax.cli.compose import compose
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="small_6m", help="model of the teacher (small_6m)")
    parser.add_argument("--student", default="small_1m", help="model of the students (small_1m)")
    parser.add_argument("--students", type=int, default=3, help="number of students (3)")
    parser.add_argument("--batch", type=int, default=8, help="rows per batch (8)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores, teacher {options.teacher}, "
        f"{options.students} students of {options.student}"
    )

    overrides = [
        f"model={options.student}",
        "objective=distillation",
        "distill=online",
        "distill.teacher=none",
    ]
    config = compose([*overrides, f"data.batch_size={options.batch}", "mesh.data=1"])
    teacher_config = compose([f"model={options.teacher}"]).model
    batch = random_batch(options.batch, config.data.seq_len, config.model.num_tokens)
    mesh = build_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        sizes = replace(teacher_config, vocab_size=config.model.vocab_size)
        student = replace(config, distill=replace(config.distill, model=sizes))
        frozen = {TEACHER: Gemma2.init(sizes, jax.random.key(1))}
        text = compose([f"model={options.student}", f"data.batch_size={options.batch}", "mesh.data=1"])
        names = [f"student{number}" for number in range(options.students)]
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

        joint_states, separate_states, text_states = (
            initial_states(student),
            initial_states(student),
            initial_states(text),
        )
        joint_frozen = {**frozen, BASE: {name: {} for name in names}}

        def step_together() -> None:
            nonlocal joint_states
            joint_states, _ = together(joint_states, joint_frozen, batch)

        def one_by_one() -> None:
            for name in names:
                separate_states[name], _ = alone[student.name](
                    separate_states[name], {**frozen, BASE: {}}, batch
                )

        def without_teacher() -> None:
            for name in names:
                text_states[name], _ = alone["text"](text_states[name], {BASE: {}}, batch)

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
                jax.block_until_ready((joint_states, separate_states, text_states))
                if number:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    print(f"{'':24}{'ms for all':>18}{'ratio':>16}{'MiB per program':>18}")
    for name, durations in seconds.items():
        ratios = [one / other for one, other in zip(durations, seconds["one by one"], strict=True)]
        columns = f"{1e3 * statistics.median(durations):>18.1f}{statistics.median(ratios):>16.2f}"
        print(f"{name:24}{columns}{mebibytes(memory[name]):>18,.0f}")


def compiled_alone(config: RunConfig, mesh: Mesh) -> Compiled:
    method = build_method(config)
    update = Update(config, method.specs)
    return compiled(method, update, update.abstract_state(mesh), config, mesh)


def compiled(method: Method, update: Any, abstract: Any, config: RunConfig, mesh: Mesh) -> Compiled:
    """Returns the compiled training step of a method."""
    step = build_train_step(method, update, abstract, config.layout)
    return step.lower(abstract, method.abstract_frozen(mesh), method.abstract_batch(mesh)).compile()


def mebibytes(program: Compiled) -> float:
    """Returns the MiB of the program's arguments and temporaries."""
    found: Any = program.memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**20


if __name__ == "__main__":
    main()
