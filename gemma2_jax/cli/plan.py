"""`gemma2 plan`: computes what a run needs on machines that you do not have."""

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.parsers import KEYS, Verbs, add_overrides, add_verb
from gemma2_jax.cli.student_options import add_students, compose_students

if TYPE_CHECKING:
    from gemma2_jax.planning.topologies import Topology
    from gemma2_jax.run import RunConfig

FITS, DOES_NOT_FIT = 0, 3

DESCRIPTION = """\
Compiles a training step for a topology, on any computer, and prints whether it fits, its memory, FLOPs and traffic, and
a lower bound on its time. Needs no data, no tokenizer and no teacher weights (distill.model gives the teacher's sizes).

  gemma2 plan experiment=distill_2b_from_9b topology=v5e:4x4
  gemma2 plan experiment=pretrain_27b topology=v5p:8x24x32 mesh=report_27b data.batch_size=768
  gemma2 plan experiment=pretrain_2b topology=h100:8 mesh=h100_8 --json
  gemma2 plan experiment=pretrain_2b topology=v5e:4x4 --search --budget 600     tries meshes, remat and microbatches
  gemma2 plan experiment=distill_2b_from_9b topology=v5e:4x4 --placement        how arrays are split; compiles nothing

  gemma2 plan --decode model=gemma2_9b compute=bfloat16 topology=v5e:1x1 --quantize int4     generation, not a step

With --student, as in train-together, the step is the one that all students share.

  gemma2 plan objective=distillation distill=online distill.teacher=runs/teacher topology=cpu:1 \\
      --student wide model=small_6m --student deep model=small_1m model.num_layers=8

topology=CHIP:SHAPE   v5e:4x4 v6e:16x16 v4:8x16x32 v5p:8x24x32 tpu7x:4x4x4   a TPU slice, by chips (extra tpu)
                      v5e:16x16*2                                            two slices
                      a100:8 h100:8 h100:16 h200:8 b200:8                    GPUs, in nodes of 8 (extra cuda12)
                      cpu:8                                                  this process's CPU devices, to try it

Exits with 0 if the step fits, 3 if it does not, 1 for an invalid request, 2 for an invalid command line.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "plan", run, "print what a run needs on a topology", DESCRIPTION, KEYS)
    add_overrides(parser)
    add_students(parser, "one of several students that are trained together, as in gemma2 train-together")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and microbatches, and rank what fits",
    )
    instead.add_argument(
        "--placement",
        action="store_true",
        help="print how weights and activations are split, and compile nothing",
    )
    instead.add_argument(
        "--decode",
        action="store_true",
        help="plan generation with the model instead of a step: prefill, and decoding of a token",
    )
    add = parser.add_argument
    add("--batch", type=int, metavar="N", help="rows of --decode (1)")
    add("--context", type=int, metavar="N", help="positions of each row of --decode (8192)")
    add("--quantize", choices=("int8", "int4"), help="format of all matrices of --decode (compute.dtype)")
    add("--quantize-cache", choices=("int8",), help="format of keys and values of --decode (compute.dtype)")
    parser.add_argument(
        "--budget", type=float, default=300.0, metavar="SECONDS", help="time for --search, in seconds (300)"
    )


def run(arguments: argparse.Namespace) -> int:
    _set_environment()
    from gemma2_jax.cli.compose import compose, pairs
    from gemma2_jax.config import UserError
    from gemma2_jax.planning.topologies import ACCEPTED, find_topology
    from gemma2_jax.training.start import with_prepared_vocabulary
    from gemma2_jax.training.together import check_alike, programs_of

    if not arguments.budget >= 0:  # also refuses nan
        raise UserError(f"--budget is {arguments.budget:g}; it must be a number of seconds, at least 0.")
    overrides = [(text, key, value) for text in arguments.overrides for key, value in pairs([text])]
    names = [str(value) for _, key, value in overrides if key == "topology"]
    if not names:
        raise UserError(f"topology is missing; set it, as in topology=v5e:4x4; {ACCEPTED}.")
    rest = [text for text, key, _ in overrides if key != "topology"]
    if not arguments.decode:
        for option in ("batch", "context", "quantize", "quantize_cache"):
            if getattr(arguments, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} belongs to --decode, which plans generation; give both, or neither."
                )
    elif arguments.student:
        raise UserError("--decode plans generation with one model; leave out --student.")
    if arguments.student:
        configs = compose_students(rest, arguments.student, arguments.config_dir)
        check_alike(configs)
    else:
        configs = [compose(rest, arguments.config_dir)]
    programs = programs_of([with_prepared_vocabulary(config) for config in configs])
    topology = find_topology(names[-1], _gpu_memory_fraction())
    plan = _plan
    for option, function in (("search", _search), ("placement", _placement), ("decode", _decode)):
        plan = function if getattr(arguments, option) else plan
    planned = [plan(runs, topology, arguments) for runs in programs]
    if arguments.json:
        found = [values for _, values in planned]
        print(json.dumps({"programs": found} if arguments.student else found[0], indent=2))
    return FITS if all(fits for fits, _ in planned) else DOES_NOT_FIT


# Each of the following functions plans the program of `runs`, prints its result unless --json is given, and returns
# whether the program fits, and the result as plain values for JSON.


def _plan(
    runs: Sequence["RunConfig"], topology: "Topology", arguments: argparse.Namespace
) -> tuple[bool, dict[str, Any]]:
    from rich.console import Console

    from gemma2_jax.planning.plan import make_plan
    from gemma2_jax.planning.printing import print_plan
    from gemma2_jax.screen import activity

    with activity(f"compiling a step of {' + '.join(run.name for run in runs)} for {topology.name}"):
        plan = make_plan(runs, topology)
    if not arguments.json:
        print_plan(plan, Console())
    return plan.fits, plan.to_dict()


def _search(
    runs: Sequence["RunConfig"], topology: "Topology", arguments: argparse.Namespace
) -> tuple[bool, dict[str, Any]]:
    from rich.console import Console

    from gemma2_jax.planning.printing import print_search
    from gemma2_jax.planning.search import search

    progress = Console(stderr=True)
    found = search(
        runs, topology, arguments.budget, lambda line: progress.print(line, style="dim", markup=False)
    )
    if not arguments.json:
        print_search(found, topology, Console())
    tried = [{"overrides": candidate.overrides} | plan.to_dict() for candidate, plan in found.plans]
    return found.plans[0][1].fits, {"tried": tried, "left": found.left}


def _placement(
    runs: Sequence["RunConfig"], topology: "Topology", arguments: argparse.Namespace
) -> tuple[bool, dict[str, Any]]:
    from rich.console import Console

    from gemma2_jax.planning.placement import find_placement
    from gemma2_jax.planning.printing import print_placement

    found = find_placement(runs, topology)
    if not arguments.json:
        console = Console()
        console.width = max(console.width, 120)  # a narrower table would lose a column
        print_placement(found, console)
    return True, found.to_dict()


def _decode(
    runs: Sequence["RunConfig"], topology: "Topology", arguments: argparse.Namespace
) -> tuple[bool, dict[str, Any]]:
    from rich.console import Console

    from gemma2_jax.formats.load import weight_format
    from gemma2_jax.planning.decoding_plan import plan_decoding
    from gemma2_jax.planning.printing import print_decoding
    from gemma2_jax.screen import activity

    batch, context = (
        default if given is None else given
        for given, default in ((arguments.batch, 1), (arguments.context, 8192))
    )
    with activity(f"compiling prefill and decoding for {topology.name}"):
        found = plan_decoding(
            runs[0],
            topology,
            batch,
            context,
            weight_format(arguments.quantize, "--quantize"),
            arguments.quantize_cache,
        )
    if not arguments.json:
        print_decoding(found, Console())
    return found.fits, found.to_dict()


def _gpu_memory_fraction() -> float:
    from gemma2_jax.config import UserError

    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise UserError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION is {text}; it must be a number above 0 and at most 1."
        )
    return fraction


def _set_environment() -> None:
    """Must run before JAX is imported: lets the compilers run without a chip, in several processes at once."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",  # these two suppress libtpu's warning that the host has no TPU
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
