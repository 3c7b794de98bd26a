"""Plans of toy runs on eight CPU devices, and of a small model on a TPU that is not present."""

import importlib.util
import io
import os
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gemma2_jax.chips import CHIPS
from gemma2_jax.config import UserError
from gemma2_jax.distill.teacher import teacher_config
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.counts import count_parameters, training_flops_per_token
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.planning.count import ProgramCost
from gemma2_jax.planning.memory import memory_parts, memory_savings, saved_activations
from gemma2_jax.planning.placement import find_placement
from gemma2_jax.planning.plan import make_plan
from gemma2_jax.planning.printing import print_plan
from gemma2_jax.planning.program import Inputs, _peak, abstract_inputs, mesh_of, required_bytes
from gemma2_jax.planning.roofline import bandwidth_along, bounds
from gemma2_jax.planning.search import candidates, estimate, search
from gemma2_jax.planning.topologies import Topology, find_machines, find_topology
from gemma2_jax.sharding.layout import LayoutConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.state import Update
from gemma2_jax.training.together import method_of, programs_of


@pytest.fixture(scope="module")
def cpus():
    return find_topology("cpu:8")


@pytest.fixture(scope="module")
def planned_run(toy_run):
    """Distillation from a teacher of given sizes whose checkpoint does not exist, on data that does not exist."""
    return replace(
        toy_run,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=replace(toy_run.data, folder="nowhere", source="nowhere.txt"),
        objective=ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48),
        distill=replace(toy_run.distill, teacher="nowhere", model=replace(toy_run.model, d_model=64)),
    )


def inputs_of(config, mesh) -> Inputs:
    method = build_method(config)
    return abstract_inputs(method, Update(config, method.specs), config, mesh)


@pytest.fixture(scope="module")
def plan(planned_run, cpus):
    return make_plan([planned_run], cpus)


@pytest.mark.thorough
def test_a_plan_needs_no_data_and_no_teacher(plan, planned_run):
    assert plan.fits
    assert plan.help == []
    found = plan.to_dict()
    teacher = teacher_config(planned_run.distill, planned_run.model)
    assert found["model_flops_per_step"] == plan.tokens * training_flops_per_token(
        planned_run.model, 32, teacher
    )
    memory = found["memory_per_device"]
    together = memory["argument_bytes"] + memory["temp_bytes"]
    assert together <= memory["peak_bytes"] <= min(1.1 * together, memory["capacity_bytes"])
    assert set(found["program_per_device"]["collective_bytes_sent"]) >= {"fsdp", "tensor"}
    estimate = found["estimate"]
    assert estimate["step_seconds_at_least"] == max(estimate["bounds_seconds"].values())
    assert estimate["bounds_seconds"][estimate["bound_by"]] == estimate["step_seconds_at_least"]


def test_the_programs_flops_agree_with_the_formula(plan):
    # The program also computes masked pairs of attention, and the scores twice.
    assert 1.0 < plan.cost.flops * plan.devices / plan.model_flops < 1.6


def test_memory_parts_equal_the_sizes_of_the_shards(planned_run, cpus, plan):
    whole = 4 * count_parameters(planned_run.model).total
    assert (
        whole / 4 <= plan.parts.parameters < whole / 2
    )  # split over fsdp and tensor, but for the norms' scales
    assert plan.parts.moments == pytest.approx(2 * plan.parts.parameters, abs=64)
    assert plan.parts.teacher > plan.parts.parameters
    alone = replace(planned_run, mesh=MeshConfig(data=8), data=replace(planned_run.data, batch_size=8))
    mesh = mesh_of([alone], cpus)
    assert memory_parts([alone], inputs_of(alone, mesh), dict(mesh.shape)).parameters == whole


@pytest.fixture(scope="module")
def students(planned_run):
    """A student like the planned run, a deeper one, and one without a teacher."""
    deep = replace(planned_run, name="deep", model=replace(planned_run.model, num_layers=4))
    text = replace(
        planned_run,
        name="text",
        objective=ObjectiveConfig(1.0, 0.0, temperature=1.0, block_tokens=48),
        distill=replace(planned_run.distill, teacher=None, model=None),
    )
    (runs,) = programs_of([text, deep, planned_run])
    return runs


@pytest.mark.thorough
def test_students_have_one_plan(students, planned_run, cpus, plan):
    """The plan counts all their parameters, and the teacher once."""
    together = make_plan(students, cpus)
    assert together.name == "deep + toy + text"
    text = students[-1]
    alone = [
        make_plan([replace(run, objective=text.objective, distill=text.distill)], cpus) for run in students
    ]
    assert (
        together.parameters
        == {run.name: count_parameters(run.model).total for run in students}
        == {one.name: one.parameters[one.name] for one in alone}
    )
    assert together.parts.parameters_by_run == {one.name: one.parts.parameters for one in alone}
    assert together.parts.parameters == sum(together.parts.parameters_by_run.values())
    assert together.parts.moments == sum(one.parts.moments for one in alone)
    assert together.parts.teacher == plan.parts.teacher
    teacher_flops = plan.model_flops - alone[1].model_flops
    assert teacher_flops > 0
    assert together.model_flops == pytest.approx(sum(one.model_flops for one in alone) + teacher_flops)
    costs = [one.cost for one in (together, *alone) if one.cost is not None]
    assert costs[0].flops > sum(cost.flops for cost in costs[1:])
    assert len(costs) == 4
    small = replace(cpus, chip=replace(cpus.chip, memory=1000))
    message = " ".join(memory_savings(students, [], small, together.parts, together.mesh, 10**8))
    assert "without --student deep" in message


def test_students_are_searched_and_placed_together(students, cpus):
    roles = [model.role for model in find_placement(students, cpus).models]
    assert roles == ["student deep", "student toy", "student text", "teacher"]
    odd = replace(students[1], model=replace(students[1].model, d_ff=63))
    assert any(
        candidate.runs[0].mesh.tensor > 1
        for candidate in candidates(students, method_of(students), cpus.machines)
    )
    for candidate in candidates([students[0], odd], method_of([students[0], odd]), cpus.machines):
        assert {run.mesh.tensor for run in candidate.runs} == {1}  # more would not divide 63


def test_candidates_divide_the_vocabulary_in_the_head(planned_run, cpus):
    model, teacher = (
        replace(each, vocab_size=303) for each in (planned_run.model, planned_run.distill.model)
    )
    odd = replace(
        planned_run,
        model=model,
        distill=replace(planned_run.distill, model=teacher),
        data=replace(planned_run.data, batch_size=8),
    )
    found = [candidate.runs[0] for candidate in candidates([odd], build_method(odd), cpus.machines)]
    for run in found:
        mesh_of([run], cpus)  # refuses what does not divide
    assert {run.mesh.data for run in found} == {8}  # 303 is odd, so no axis can split the vocabulary


def test_placed_weights_are_as_large_as_the_shards(planned_run, cpus, plan):
    placement = find_placement([planned_run], cpus)
    sizes = {model.role: sum(weight.device_bytes for weight in model.weights) for model in placement.models}
    assert sizes == {"student": plan.parts.parameters, "teacher": plan.parts.teacher}


def test_a_teacher_can_have_another_layout(planned_run, cpus):
    apart = LayoutConfig(weights={"D": ("fsdp",), "F": ("tensor",)}, head=("tensor",))
    student, teacher = find_placement(
        [replace(planned_run, distill=replace(planned_run.distill, layout=apart))], cpus
    ).models
    assert [model.weights[0].axes for model in (student, teacher)] == [
        {"V": ("tensor",), "D": ("fsdp",)},
        {"D": ("fsdp",)},
    ]
    assert [model.head for model in (student, teacher)] == [("tensor", "fsdp"), ("tensor",)]


def test_remat_saves_fewer_activations(planned_run):
    kept = [
        saved_activations(replace(planned_run, compute=ComputeConfig(remat=remat)), {"data": 2})
        for remat in ("none", "dots", "full", "offload")
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] == 2 * 32 * 4 * planned_run.model.d_model  # 2 rows a device, one pair of layers


@pytest.mark.parametrize(("platform", "peak"), [("cpu", 1820), ("cuda", 1820), ("tpu", 1100)])
def test_temporaries_need_memory_in_addition_to_the_arguments(platform, peak):
    """With the figures of the CPU compiler, whose own peak leaves out temporaries."""
    found = SimpleNamespace(
        argument_size_in_bytes=1000,
        output_size_in_bytes=920,
        alias_size_in_bytes=900,
        temp_size_in_bytes=800,
        peak_memory_in_bytes=1100,
    )
    assert _peak(found, platform) == peak


@pytest.mark.thorough
def test_a_plan_for_cpus_can_fail_by_its_temporaries(planned_run, cpus, plan):
    memory = plan.program.memory
    assert memory.temp
    between = replace(cpus, chip=replace(cpus.chip, memory=memory.argument + memory.temp // 2))
    refused = make_plan([planned_run], between)
    assert not refused.fits
    (_, searched), *_ = search([planned_run], replace(cpus, chip=replace(cpus.chip, memory=1000)), 0.0).plans
    assert searched.program.memory.temp
    assert searched.program.memory.peak > searched.program.memory.argument + searched.program.memory.temp - 1


def test_a_step_that_does_not_fit_lists_what_would_help(planned_run, cpus):
    small = replace(cpus, chip=replace(cpus.chip, memory=1000))
    plan = make_plan([planned_run], small)
    assert not plan.fits
    message = " ".join(plan.help)
    for words in ("compute.remat=full", "mesh.fsdp=4", "distill.dtype=bfloat16", "twice as many devices"):
        assert words in message
    assert message.count("estimate;") == len(plan.help)
    parts = replace(plan.parts, activations=10**9)
    assert "enough by itself" in memory_savings([planned_run], [], small, parts, plan.mesh, 10**8)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=3)}, "needs exactly 3 devices"),
        ({"mesh": MeshConfig(data=1, tensor=8)}, "along mesh.tensor, which is 8 and does not divide it"),
        ({"mesh": MeshConfig(data=8)}, "data.batch_size / training.accumulation is 4 rows"),
    ],
)
def test_incompatible_settings_are_reported(changes, message, planned_run, cpus):
    with pytest.raises(UserError, match=message):
        make_plan([replace(planned_run, **changes)], cpus)


def test_a_teacher_of_unknown_sizes_is_reported(planned_run, cpus):
    unknown = replace(planned_run, distill=replace(planned_run.distill, model=None))
    with pytest.raises(
        UserError,
        match=r"distill\.teacher is nowhere, which does not exist on this machine; .* distill\.model",
    ):
        make_plan([unknown], cpus)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: … required for HLO temporaries (6.00T) exceeds available HBM (15.75G).",
            6 * 2**40,
        ),
        (
            "RESOURCE_EXHAUSTED: … Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            20.5 * 2**30,
        ),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_the_required_memory_is_parsed_from_the_compilers_error(error, size):
    assert required_bytes(error) == size


class Device:
    """A device in a torus, in one of several slices."""

    def __init__(self, coords, slice_index):
        self.coords, self.slice_index = coords, slice_index


class FakeMesh:
    """Two slices of 2x4 chips as replica x fsdp x tensor."""

    axis_names = ("replica", "fsdp", "tensor")

    def __init__(self):
        self.devices = np.empty((2, 2, 4), object)
        for place in np.ndindex(2, 2, 4):
            self.devices[place] = Device((place[1], place[2], 0), place[0])


def test_each_network_has_its_own_bandwidth():
    chip = CHIPS["v5e"]
    topology = Topology("v5e:2x4*2", chip, (None,) * 16, "tpu")
    mesh: Any = FakeMesh()
    assert bandwidth_along(("tensor",), mesh, topology) == 2 * chip.link_bandwidth
    assert bandwidth_along(("fsdp", "tensor"), mesh, topology) == 4 * chip.link_bandwidth
    assert bandwidth_along(("replica",), mesh, topology) == chip.network_bandwidth
    cost = ProgramCost(flops=197e12, bytes=819e9 * 2)
    cost.sent["all-reduce", ("replica",)] = 3 * chip.network_bandwidth
    cost.sent["all-gather", ("replica",)] = chip.network_bandwidth
    found = bounds(cost, 197e12 / 2, mesh, topology)
    assert asdict(found) == {"compute": 1.5, "memory": 2.0, "network": {"replica": 4.0}}
    assert (found.binding, found.seconds) == ("network along replica", 4.0)


def test_an_estimate_agrees_with_the_plan(planned_run, plan, monkeypatch):
    """State and teacher up to the scales of the norms, which are not split; it needs no compiler for the chips."""
    found = estimate(planned_run, "cpu:8")
    assert [each.fits for each in found] == sorted((each.fits for each in found), reverse=True)
    (same,) = [
        each
        for each in found
        if (each.runs[0].mesh, each.runs[0].compute, each.runs[0].training)
        == (replace(planned_run.mesh, replica=1), planned_run.compute, planned_run.training)
    ]
    for name in ("parameters", "moments", "gradients", "teacher"):
        assert getattr(same.parts, name) == pytest.approx(getattr(plan.parts, name), rel=0.02)
    assert (same.parts.activations, same.parts.logits) == (plan.parts.activations, plan.parts.logits)
    assert same.parts.total == sum(
        value for name, value in asdict(same.parts).items() if name != "parameters_by_run"
    )
    assert same.compute == pytest.approx(plan.model_flops / 8 / plan.topology.chip.peak_flops)
    absent = estimate(planned_run, "v5e:2x4")
    assert {each.overrides for each in absent} == {each.overrides for each in found}
    assert absent[0].compute < found[0].compute


@pytest.mark.thorough
def test_candidates_divide_and_the_search_keeps_its_budget(planned_run, cpus):
    waiting = candidates([planned_run], build_method(planned_run), cpus.machines)
    assert len({candidate.overrides for candidate in waiting}) == len(waiting) > 10
    for candidate in waiting:
        mesh = mesh_of(candidate.runs, cpus)
        inputs_of(candidate.runs[0], mesh)  # refuses what does not divide
    found = search([planned_run], cpus, budget=0.0)
    assert (len(found.plans), found.left) == (1, len(waiting) - 1)
    assert found.plans[0][0].runs[0].compute.remat == "none"  # the fastest of those that fit


def test_a_search_without_a_mesh_is_reported(planned_run, cpus):
    odd = replace(planned_run, data=replace(planned_run.data, batch_size=3, seq_len=31))
    with pytest.raises(UserError, match=r"no mesh of the 8 devices of cpu:8 divides both"):
        search([odd], cpus, budget=0.0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_a_plan_for_a_tpu_without_having_one(planned_run):
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    config = replace(
        planned_run,
        mesh=MeshConfig(data=2, fsdp=4, tensor=2),
        data=replace(planned_run.data, batch_size=16, seq_len=256),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
    )
    topology = find_topology("v5e:4x4")
    assert find_machines("v5e:4x4") == topology.machines
    plan = make_plan([config], topology)
    assert plan.fits
    assert plan.cost is not None
    assert plan.cost.uncounted == 0
    assert plan.cost.flops > 0


@pytest.mark.thorough
def test_averaged_weights_are_planned(planned_run, cpus):
    averaging = replace(planned_run, training=replace(planned_run.training, ema=0.999))
    plan = make_plan([averaging], cpus)
    assert plan.parts.averaged == plan.parts.parameters
    console = Console(record=True, width=200, file=io.StringIO())
    print_plan(plan, console)
    assert "averaged weights" in console.export_text()
    small = replace(cpus, chip=replace(cpus.chip, memory=1000))
    help = memory_savings([averaging], [], small, plan.parts, plan.mesh, 10)
    assert any(line.startswith("training.ema=null: saves") for line in help)
