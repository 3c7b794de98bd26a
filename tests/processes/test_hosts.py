"""The processes of a job, found from the configuration and the environment, and how they connect."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from gemma2_jax.config import UserError
from gemma2_jax.processes import hosts, rendezvous
from gemma2_jax.processes.hosts import HostsConfig, JobProcess, check_agreement, find_job_process, join
from gemma2_jax.processes.rendezvous import Links, meet, split_address
from tests.multihost.job import free_port

SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *SLURM,
        *OPEN_MPI,
        "KUBERNETES_SERVICE_HOST",
        "JOB_COMPLETION_INDEX",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_GPUS_PER_TASK",
        "SLURM_TRES_PER_TASK",
        "TPU_SKIP_MDS_QUERY",
        "TPU_WORKER_HOSTNAMES",
        "TPU_PROCESS_ADDRESSES",
        "MEGASCALE_COORDINATOR_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_one_process_by_default() -> None:
    assert find_job_process(HostsConfig()) is None
    join(HostsConfig())  # does nothing: JAX is at work here already


def test_what_is_configured() -> None:
    process = find_job_process(HostsConfig("10.0.0.1:8476", 2, 1))
    assert process == JobProcess("10.0.0.1:8476", 2, 1)
    assert find_job_process(HostsConfig("10.0.0.1:8476", 1, 0)) is None


def test_slurm(within: Callable[..., None]) -> None:
    within(**SLURM)
    assert find_job_process(HostsConfig()) == JobProcess(
        f"node003:{65535 - 2**12 + 1 + 17}", 4, 3, (1,), "SLURM"
    )
    assert find_job_process(HostsConfig(coordinator="node003:99")) == JobProcess(
        "node003:99", 4, 3, (1,), "SLURM"
    )
    number_given = find_job_process(HostsConfig(coordinator="node003:99", num_processes=4))
    assert number_given == JobProcess("node003:99", 4, 3, (1,), "hosts.num_processes")
    assert find_job_process(HostsConfig(detect=False)) is None
    within(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert find_job_process(HostsConfig()) is None


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (SLURM, (1,)),  # the number of processes is unknown
        (SLURM | {"CUDA_VISIBLE_DEVICES": "4,6"}, (1,)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, None),  # its own, as SLURM shows it to each
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "gres/gpu:2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_STEP_TASKS_PER_NODE": "1,3"}, (1,)),
        (SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3,1"}, None),
        (OPEN_MPI, (1,)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
    ],
)
def test_the_devices_of_a_host_are_divided_among_its_processes(
    within: Callable[..., None], variables: dict[str, str], devices: tuple[int, ...] | None
) -> None:
    within(**variables)
    process = find_job_process(HostsConfig())
    assert process is not None
    assert process.devices == devices


@pytest.mark.parametrize("number", range(4))
def test_no_process_has_fewer_devices_than_another(within: Callable[..., None], number: int) -> None:
    """Four on a host, of which each sees the same two: none of them is left one, and others both."""
    within(**SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4"})
    within(SLURM_NODEID="0", SLURM_PROCID=str(number), SLURM_LOCALID=str(number))
    process = find_job_process(HostsConfig())
    assert process is not None
    assert process.devices is None


def test_open_mpi(within: Callable[..., None]) -> None:
    within(**OPEN_MPI)
    process = find_job_process(HostsConfig())
    assert process is not None
    assert process.coordinator.startswith("10.96.0.1:")
    assert (process.num_processes, process.process_id, process.count_source) == (2, 1, "Open MPI")


def test_tpu_pods_of_gke(within: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slices of two hosts each, in a JobSet; JAX looks for the chips themselves, which are not here."""
    gke: Any = cloud_tpu_cluster.GkeTpuCluster
    monkeypatch.setattr(gke, "is_env_present", lambda: True)
    monkeypatch.setattr(gke, "wait_for_coordinator", lambda *_: None)
    monkeypatch.setattr(gke, "get_local_process_id", lambda: None)
    within(
        KUBERNETES_SERVICE_HOST="10.0.0.1",
        JOB_COMPLETION_INDEX="1",
        TPU_WORKER_HOSTNAMES="a-0,a-1",
        TPU_WORKER_ID="1",
        MEGASCALE_COORDINATOR_ADDRESS="b-0",
        MEGASCALE_NUM_SLICES="2",
        MEGASCALE_SLICE_ID="1",
    )
    assert find_job_process(HostsConfig()) == JobProcess("b-0:8482", 4, 3, None, "GKE")


@pytest.mark.parametrize("endpoints", ["t-0,t-1", "x:0:t-0,x:1:t-1"])
def test_tpu_vms(within: Callable[..., None], monkeypatch: pytest.MonkeyPatch, endpoints: str) -> None:
    """Two slices of two hosts each, as queued resources make them; a VM's metadata describes its slice only."""
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": ""}
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    assert find_job_process(HostsConfig()) == JobProcess("t-0:8482", 2, 1, None, "the TPU VM")
    metadata["tpu-env"] = (
        "MEGASCALE_COORDINATOR_ADDRESS: 's-0:8080'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
    )
    assert find_job_process(HostsConfig()) == JobProcess("s-0:8482", 4, 3, None, "the TPU VM")


def test_kubernetes(within: Callable[..., None]) -> None:
    within(KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_job_process(HostsConfig()) is None  # a pod of no job, such as a notebook's
    within(JOB_COMPLETION_INDEX="2")
    with pytest.raises(UserError, match=r"is pod 2 of a Kubernetes job.* pip install kubernetes, or set"):
        find_job_process(HostsConfig())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "node"}, r"hosts\.coordinator is node; accepted: HOST:PORT"),
        ({"num_processes": 0}, r"hosts\.num_processes is 0; it must be at least 1"),
        ({"num_processes": 2, "process_id": 2}, r"hosts\.process_id is 2; accepted: 0 to 1, one less than"),
        ({"process_id": -1}, r"hosts\.process_id is -1; accepted: 0"),
        ({"timeout": 0}, r"hosts\.timeout is 0"),
        ({"num_processes": 2}, r"hosts\.coordinator and hosts\.process_id must be set"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_job_process(HostsConfig(**given))


def test_what_only_one_process_has_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"seed": 0, "data": "a", "teacher": "b"}
    client = SimpleNamespace(blocking_key_value_get=lambda *_: json.dumps(first))
    monkeypatch.setattr(hosts, "coordinator_client", lambda: client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    check_agreement(first)
    with pytest.raises(UserError, match="teacher is b in process 0 and missing in process 1; all processes"):
        check_agreement({"seed": 0, "data": "a"})
    with pytest.raises(UserError, match="cache is missing in process 0 and c in process 1; all processes"):
        check_agreement(first | {"cache": "c"})


def closed(links: Links) -> list[int]:
    """The numbers of the processes to which there were connections."""
    for link in links.values():
        link.close()
    return sorted(links)


def meeting(*places: tuple[int, int], timeout: float = 5.0) -> list[str | None]:
    """Connects processes (number of processes, own number); returns each one's error message, or None."""
    coordinator = f"127.0.0.1:{free_port()}"

    def result(place: tuple[int, int]) -> str | None:
        try:
            closed(meet(coordinator, *place, timeout))
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(result, places))


def test_all_meet() -> None:
    assert meeting((3, 2), (3, 0), (3, 1)) == [None, None, None]


def test_all_processes_report_the_missing_ones() -> None:
    first, second = meeting((4, 0), (4, 2), timeout=0.5)
    assert first is not None
    assert first == second
    assert first.startswith("2 of 4 processes (set by hosts.num_processes) did not connect within 0.5 s ")
    assert first.endswith("(hosts.timeout): process 1, 3; to run a single process, set hosts=single.")


def test_process_0_prints_once_which_processes_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_QUIET_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"^2 of 3 processes \(set by SLURM\) did not connect within"):
        meet(f"127.0.0.1:{free_port()}", 3, 0, 0.5, "SLURM")
    assert capsys.readouterr().err == ("gemma2: waiting for 2 of 3 processes (set by SLURM): process 1, 2.\n")


def test_two_of_one_number() -> None:
    messages = meeting((4, 0), (4, 1), (4, 1), timeout=2.0)
    assert set(messages) == {"hosts.process_id is 1 in two processes; each needs a number of its own."}


def test_one_that_died_and_was_started_again_while_others_were_missing() -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, address, 3, 0, 10.0)
        died = knocked(port)
        died.sendall(b'{"greeting": "gemma2_jax", "process": 1, "processes": 3}\n')
        died.close()
        others = [pool.submit(meet, address, 3, number, 10.0) for number in (1, 2)]
        assert closed(first.result()) == [1, 2]
        assert [closed(other.result()) for other in others] == [[0], [0]]


def test_another_number_of_processes() -> None:
    first, second = meeting((3, 0), (2, 1))
    assert first == second
    assert first is not None
    assert first.startswith("hosts.num_processes is 3 in process 0 and 2 in process 1;")


def test_no_process_answers() -> None:
    (message,) = meeting((2, 1), timeout=0.3)
    assert message is not None
    assert message.startswith(
        "process 1 of 2 (set by hosts.num_processes) cannot reach the coordinator, process 0 at 127.0.0.1:"
    )
    assert message.endswith("; to run a single process, set hosts=single.")


def knocked(port: int) -> socket.socket:
    """A connection to process 0, which is about to listen."""
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            threading.Event().wait(0.05)
    raise AssertionError("nobody listens")


def test_a_stranger_at_the_door_is_ignored() -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, address, 2, 0, 10.0)
        with knocked(port) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
        assert closed(pool.submit(meet, address, 2, 1, 10.0).result()) == [0]
        assert closed(first.result()) == [1]


def test_a_port_that_is_taken() -> None:
    port = free_port()

    with socket.create_server(("", port)), pytest.raises(UserError, match=f"cannot listen on port {port}"):
        meet(f"127.0.0.1:{port}", 2, 0, 1.0)


def test_addresses() -> None:
    assert split_address("node-3.cluster:8476") == ("node-3.cluster", 8476)
    assert split_address("[fe80::1]:8476") == ("fe80::1", 8476)
