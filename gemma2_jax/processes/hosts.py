"""A job of several processes, on one host or many: how they find each other, wait for each other, and end.

    join(config.hosts)            # before anything is computed
    with first_process_first():   # process 0 makes what the others then find
        prepare(...)
    ending.leave(0, None)         # as the command line does, at the end

The processes of a job are given by the configuration, or by their launcher: SLURM, Open MPI, a TPU pod, GKE.
"""

import importlib.util
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from gemma2_jax.config import UserError, differences
from gemma2_jax.messages import one_line, written
from gemma2_jax.processes.ending import watch
from gemma2_jax.processes.jax_private import cluster_found, completed_by, coordinator_client
from gemma2_jax.processes.links import JAX_SILENCE
from gemma2_jax.processes.rendezvous import meet, split_address

_WAIT_MS = 24 * 3600 * 1000  # longest time that process 0 may take to prepare data
_POLL = 0.2  # seconds
_PREFIX = "gemma2_jax"  # of the keys in the coordinator's store
_CLUSTERS = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gcetpu": "the TPU VM",
    "gketpu": "GKE",
    "": "Kubernetes",  # JAX gives it no name
}
_counter: dict[str, int] = {}  # number of waits by name; the same in all processes

_Known = tuple[str | None, int | None, int | None]  # coordinator, number of processes, this one's


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a job. Null values are taken from the environment; if it has none either, there is one process.

    Attributes:
        coordinator: HOST:PORT of process 0; the port must be free there.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        detect: whether to use the environment.
        timeout: seconds that processes wait for each other at the start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    detect: bool = True
    timeout: int = 300

    def __post_init__(self) -> None:
        if self.coordinator is not None:
            split_address(self.coordinator)
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"hosts.num_processes is {self.num_processes}; it must be at least 1.")
        if self.timeout < 1:
            raise UserError(f"hosts.timeout is {self.timeout}; it must be at least 1 second.")
        if self.process_id is not None:
            _check_number(self.process_id, self.num_processes)


@dataclass(frozen=True)
class JobProcess:
    """One process in its job.

    Attributes:
        devices: indices of the host's devices that belong to this process; None for all of them.
        count_source: the setting or launcher that gives the number of processes.
    """

    coordinator: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None = None
    count_source: str = "hosts.num_processes"


def join(config: HostsConfig) -> None:
    """Connects this process to its job, if there are several processes; call it before JAX uses its devices.

    Raises:
        UserError: a setting of the processes is missing, or not all processes connect.
    """
    if jax.distributed.is_initialized():
        return  # an earlier run in this process has joined already
    process = find_job_process(config)
    if process is None:
        return
    links = meet(
        process.coordinator, process.num_processes, process.process_id, config.timeout, process.count_source
    )
    # This service would take over SIGTERM from the command line, which ends this process and with it the others.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        process.coordinator,
        process.num_processes,
        process.process_id,
        process.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=config.timeout,
        heartbeat_timeout_seconds=JAX_SILENCE,
    )
    watch(coordinator_client(), process.process_id, process.num_processes, links)
    if not is_first():
        # JAX's collectives between CPUs print their connections, from C++.
        sys.stdout.flush()
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)


def find_job_process(config: HostsConfig) -> JobProcess | None:
    """This process's role in its job, from the configuration and then the environment; None if it is alone.

    Raises:
        UserError: a setting is missing, or the process number is out of range.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    count_source, devices = "", None
    if config.detect and None in given:
        count_source, (coordinator, num_processes, process_id), devices = _detected(given, config.timeout)
    else:
        coordinator, num_processes, process_id = given
    found = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"hosts.{name}" for name, value in found.items() if value is None]
    if len(missing) == len(found) or num_processes == 1:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"{' and '.join(missing)} must be set too: neither the other keys of hosts nor the environment provide a "
            "value."
        )
    _check_number(process_id, num_processes)
    if config.num_processes is not None:
        count_source = "hosts.num_processes"
    return JobProcess(coordinator, num_processes, process_id, devices, count_source)


def is_first() -> bool:
    """Whether this is process 0, which alone prints, and alone writes what is not divided among all processes."""
    return jax.process_index() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the block first in process 0, then in the others.

    These find on a shared disk what process 0 has made.
    """
    if jax.process_count() == 1:
        yield
        return
    if not is_first():
        wait_for_all("first")
    yield
    if is_first():
        wait_for_all("first")


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it.

    It does not use the devices, because some processes may have to compile their programs first.
    """
    if jax.process_count() > 1:
        _interruptibly(coordinator_client().wait_at_barrier, _numbered(name), _WAIT_MS)


def check_agreement(values: Mapping[str, Any]) -> None:
    """Raises UserError in a process whose values differ from those of process 0: it would wait forever.

    Args:
        values: JSON values by name; if nested values differ, the message names their key.
    """
    if jax.process_count() == 1:
        return
    first = from_first(values)
    for name, there, here in differences(first, json.loads(json.dumps(values)), missing="missing"):
        raise UserError(
            f"{name} is {written(there)} in process 0 and {written(here)} in process {jax.process_index()}; all "
            "processes must be started by the same command, and see the same files."
        )


def first_finding(found: str | None) -> str | None:
    """The finding of the first process that has one, in all processes; None if none has. Waits for all."""
    return next((text for text in from_all(found) if text), None)


def from_first(value: Any) -> Any:
    """The value that process 0 gives, in all processes, after a round trip through JSON."""
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    key = _numbered("first")
    if is_first():
        coordinator_client().key_value_set(key, json.dumps(value))
    return json.loads(_interruptibly(coordinator_client().blocking_key_value_get, key, _WAIT_MS))


def from_all(value: Any) -> list[Any]:
    """The values of all processes, in order of their numbers, after a round trip through JSON; waits for all."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    key = _numbered("all")
    coordinator_client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    wait_for_all(key)
    given = {
        name.rpartition("/")[2]: text for name, text in coordinator_client().key_value_dir_get(f"{key}/")
    }
    return [json.loads(given[str(number)]) for number in range(jax.process_count())]


def _interruptibly(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `call`, which waits in C++.

    It runs in a thread, so that a signal, or another process's end, can interrupt the wait here.
    """
    given: Future[Any] = Future()

    def run() -> None:
        try:
            given.set_result(call(*arguments))
        except BaseException as error:
            given.set_exception(error)

    threading.Thread(target=run, daemon=True, name="waiting for other processes").start()
    while not given.done():
        wait([given], _POLL)  # `_thread.interrupt_main` is seen between two waits only
    return given.result()


def _numbered(name: str) -> str:
    _counter[name] = _counter.get(name, 0) + 1
    return f"{_PREFIX}/{name}/{_counter[name]}"


def _check_number(process_id: int, num_processes: int | None) -> None:
    if process_id < 0 or (num_processes is not None and process_id >= num_processes):
        last = "" if num_processes is None else f" to {num_processes - 1}, one less than hosts.num_processes"
        raise UserError(f"hosts.process_id is {process_id}; accepted: 0{last}.")


def _detected(given: _Known, timeout: int) -> tuple[str, _Known, tuple[int, ...] | None]:
    """The launcher of the job, `given` completed with its values, and the devices of this process.

    The launcher is the first cluster that JAX detects; "" if there is none.
    """
    if _is_alone_in_kubernetes():
        return "", given, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing package, which the check above reports
        try:
            cluster = cluster_found()
            if cluster is None:
                return "", given, None
            coordinator, num_processes, process_id, devices = completed_by(cluster, *given, timeout)
        except Exception as error:  # whatever a cluster's tools raise
            raise UserError(
                f"this looks like a job of several processes, but their number cannot be found: {one_line(error)}; set "
                "hosts.coordinator, hosts.num_processes and hosts.process_id, or hosts=single."
            ) from None
    own = None if devices is None else _own_devices(devices[0])
    return _CLUSTERS.get(cluster.name, cluster.name), (coordinator, num_processes, process_id), own


def _is_alone_in_kubernetes() -> bool:
    """Whether this is a pod outside of any job of several; JAX takes every pod for part of such a job.

    Raises:
        UserError: it belongs to a job, and the package through which JAX finds its size is not installed.
    """
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "TPU_WORKER_HOSTNAMES" in os.environ:
        return False
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is None:
        return True
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            f"this is pod {index} of a Kubernetes job, and JAX needs a package to find the job's size: pip install "
            "kubernetes, or set hosts.coordinator, hosts.num_processes and hosts.process_id, or hosts=single."
        )
    return False


def _own_devices(local_id: int) -> tuple[int, ...] | None:
    """The indices of a process's devices, among those visible to it, by its number on its host; None for all.

    A process has all devices if it is alone on its host, if SLURM shows each process its own, or if there are fewer
    devices than processes; otherwise they are divided evenly. If their number, or that of the processes, is unknown,
    JAX's rule holds: one device per process.
    """
    tasks = _processes_on_host()
    given_by_slurm = "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    if tasks == 1 or given_by_slurm:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or tasks is None:
        return (local_id,)
    each = len(visible.split(",")) // tasks
    return tuple(range(local_id * each, (local_id + 1) * each)) or None


def _processes_on_host() -> int | None:
    """The number of the job's processes on this host, if SLURM or Open MPI provides it."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts: list[int] = []  # for each node; SLURM writes 4,4,3 as 4(x2),3
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None
