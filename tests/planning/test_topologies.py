"""Names of topologies whose devices need not be present."""

import importlib.util

import pytest

from gemma2_jax.chips import CHIPS, chip_of_kind
from gemma2_jax.config import UserError
from gemma2_jax.planning.gpus import target_config
from gemma2_jax.planning.topologies import find_machines, find_topology


def test_the_devices_of_this_process():
    topology = find_topology("cpu:8")
    assert (len(topology.devices), topology.platform) == (8, "cpu")
    assert {topology.island(device) for device in topology.devices} == {0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is not of the form CHIP:SHAPE; accepted: names such as v5e:4x4"),
        ("v5e:4x", "is not of the form CHIP:SHAPE"),
        ("v5x:4x4", "accepted: a100, b200, cpu, h100, h200, tpu7x, v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "accepted: shapes such as v5e:4x4"),
        ("v5p:4x4", "accepted: shapes such as v5p:4x4x4"),
        ("h100:2x4", "accepted: shapes such as h100:8"),
        ("h100:8*2", "accepted: shapes such as h100:8"),
        ("cpu:9", "--xla_force_host_platform_device_count=9"),
    ],
)
def test_mistakes_are_reported(name, message):
    with pytest.raises(UserError, match=rf"^topology={name.replace('*', '.')} ") as error:
        find_topology(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "devices", "slices"),
    [
        ("v5e:4x4", 16, 1),
        ("v5e:4x4*2", 32, 2),
        ("tpu7x:2x2x1", 8, 1),  # a chip is two devices
        ("h100:4", 4, 1),
        ("h100:16", 16, 2),
        ("cpu:8", 8, 1),
    ],
)
def test_machines_need_no_compiler(name, devices, slices):
    machines = find_machines(name)
    assert (machines.devices, machines.slices) == (devices, slices)
    assert machines.capacity == machines.chip.memory * (0.75 if name.startswith("h100") else 1)


@pytest.mark.parametrize("find", [find_topology, find_machines])
def test_gpus_fill_their_nodes(find):
    with pytest.raises(UserError, match="topology=h100:12 has 12 GPUs; accepted: 1 to 8, or a multiple of 8"):
        find("h100:12")


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda12")])
def test_a_missing_compiler_names_its_extra(name, extra, monkeypatch):
    def find_spec(module):
        if "." in module:  # as Python does where the package is not there either
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
        find_topology(name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v4", "v4"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_chips_are_found_by_jax_device_kind(kind, name):
    assert chip_of_kind(kind) is CHIPS[name]


def test_a_gpu_is_described_by_its_figures():
    text = target_config("h100", CHIPS["h100"])
    assert "device_memory_size: 84929347584" in text
    assert "major: 9 minor: 0" in text
    assert "memory_bandwidth: 3352000000000" in text
