"""Meshes that fit, and the sentences about those that do not."""

import jax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=8, fsdp=-1), (8, 1, 1)),
    ],
)
def test_axes(config, shape):
    mesh = build_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


def test_some_of_the_devices():
    devices = jax.devices()[2:4]
    assert build_mesh(MeshConfig(tensor=2), devices).devices.ravel().tolist() == devices


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"fsdp": 0}, "mesh.fsdp is 0; it must be at least 1, or -1 for the devices that are left."),
        ({"tensor": -2}, "mesh.tensor is -2; it must be at least 1, or -1 for the devices that are left."),
        ({"fsdp": -1}, "mesh has -1 for more than one of data, fsdp, tensor; only one of them can be -1."),
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
    with pytest.raises(UserError, match=r"^mesh data=.* does not fit 8 device\(s\); the axes must multiply"):
        build_mesh(config)
