"""Meshes that fit, and the sentences about those that do not."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from gemma2_jax.cli.compose import compose
from gemma2_jax.config import UserError
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.mesh import AXES, MeshConfig, build_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 1, 4, 1, 2)),
        (MeshConfig(data=8, fsdp=-1), (1, 8, 1, 1, 1)),
        (MeshConfig(replica=2, data=1, sequence=-1), (2, 1, 1, 4, 1)),
    ],
)
def test_axes(config, shape):
    mesh = build_mesh(config)
    assert mesh.axis_names == ("replica", "data", "fsdp", "sequence", "tensor")
    assert mesh.devices.shape == shape


def test_some_of_the_devices():
    devices = jax.devices()[2:4]
    assert build_mesh(MeshConfig(tensor=2), devices).devices.ravel().tolist() == devices


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"fsdp": 0}, "mesh.fsdp is 0; it must be at least 1, or -1 for all remaining devices."),
        ({"tensor": -2}, "mesh.tensor is -2; it must be at least 1, or -1 for all remaining devices."),
        (
            {"fsdp": -1},
            "mesh has -1 for more than one of replica, data, fsdp, sequence, tensor; only one of them can be -1.",
        ),
    ],
)
def test_sizes_that_make_no_mesh(sizes, sentence):
    with pytest.raises(UserError) as error:
        MeshConfig(**sizes)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(data=-1, tensor=3), MeshConfig(data=-1, fsdp=16)]
)
def test_a_mesh_that_does_not_fit_the_machine(config):
    with pytest.raises(
        UserError,
        match=r"^mesh\..*=.* needs .* devices, but there are 8 devices; choose axes that multiply to 8, or",
    ):
        build_mesh(config)


@dataclass(frozen=True)
class Chip:
    """A device of one of several slices, with the attributes that building a mesh uses."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_only_replicas_span_slices():
    chips = [Chip(i, slice_index=i // 4) for i in range(8)]
    devices: Any = build_mesh(MeshConfig(replica=2, data=1, fsdp=2, tensor=2), chips).devices
    assert devices.shape == (2, 1, 2, 1, 2)
    assert [{chip.slice_index for chip in replica.ravel()} for replica in devices] == [{0}, {1}]


def test_more_slices_than_replicas_are_refused():
    chips: Any = [Chip(i, slice_index=i // 2) for i in range(8)]
    with pytest.raises(UserError) as error:
        build_mesh(MeshConfig(replica=2, data=-1), chips)
    assert str(error.value) == (
        "mesh.replica is 2, but the devices come in 4 slices; it must be a multiple of 4, so that only gradients "
        "cross the network between slices."
    )


def test_nodes_of_gpus_need_no_replicas():
    chips: Any = [Chip(i, slice_index=i // 2, process_index=i // 2, platform="gpu") for i in range(8)]
    devices = build_mesh(MeshConfig(data=1, fsdp=4, tensor=2), chips).devices.reshape(4, 2)
    assert [{chip.process_index for chip in row} for row in devices] == [{0}, {1}, {2}, {3}]


PRESETS = {
    "cpu_1": 1, "cpu_8": 8, "h100_8": 8, "v5e_16": 16, "v5e_64": 64, "v5e_256": 256, "v6e_256": 256, "v5p_16": 16,
    "v5p_128": 128, "report_2b": 512, "report_9b": 4096, "report_27b": 6144,
}  # fmt: skip


@pytest.mark.parametrize(("name", "devices"), PRESETS.items())
def test_presets_have_the_sizes_in_their_names(name, devices):
    config = compose([f"mesh={name}"]).mesh
    assert math.prod(getattr(config, axis) for axis in AXES) == devices


def test_the_reports_set_ups():
    """Data shards x model shards (Gemma 2 report, table 3)."""
    shards = {}
    for size in ("2b", "9b", "27b"):
        mesh = compose([f"experiment=report_{size}"]).mesh
        shards[size] = (mesh.replica * mesh.data * mesh.fsdp, mesh.tensor)
    assert shards == {"2b": (512, 1), "9b": (1024, 4), "27b": (768, 8)}


@pytest.mark.parametrize(
    "name",
    ["pretrain_2b", "pretrain_9b", "pretrain_27b", "distill_2b_from_9b", "distill_9b_from_27b", "sft_2b",
     "report_2b", "report_9b", "report_27b"],
)  # fmt: skip
def test_the_mesh_of_every_experiment_divides_its_models(name):
    config = compose([f"experiment={name}"])
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    models = [config.model] if config.distill.model is None else [config.model, config.distill.model]
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    for model in models:
        abstract_params(weight_specs(model), mesh=mesh)  # refuses what does not divide
    assert config.data.batch_size % (sizes["replica"] * sizes["data"] * sizes["fsdp"]) == 0
