"""A job of several processes, on one host or many: how they find one another, wait for one another, and end.

    join(config.hosts)            # before anything is computed
    with first_process_first():   # process 0 makes what the others then find
        prepare(...)
    ending.leave(0, None)         # as the command line does, at the end

Which processes there are is told by the configuration, or by what started them: SLURM, Open MPI, a TPU pod, GKE.
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
from gemma2_jax.processes.ending import watch
from gemma2_jax.processes.jax_private import cluster_found, completed_by, coordinator_client
from gemma2_jax.processes.links import JAX_SILENCE
from gemma2_jax.processes.rendezvous import meet, split_address

_WAIT_MS = 24 * 3600 * 1000  # for process 0 to prepare data, at most
_BETWEEN_LOOKS = 0.2  # seconds
_PREFIX = "gemma2_jax"  # of what is kept with JAX's coordinator
_CLUSTERS = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gcetpu": "the TPU VM",
    "gketpu": "GKE",
    "": "Kubernetes",  # JAX gives it no name
}
_counter: dict[str, int] = {}  # how often each wait was come by; the same in all processes

_Known = tuple[str | None, int | None, int | None]  # coordinator, number of processes, this one's


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a job. What is null is asked of the environment; where that knows nothing, there is one.

    Attributes:
        coordinator: HOST:PORT of process 0, with a port that is free there.
        num_processes: how many there are.
        process_id: this one's number, from 0.
        detect: whether the environment is asked.
        timeout: seconds that processes wait for one another at the start.
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
        devices: numbers of the host's devices that are this process's; None for all of them.
        told_by: what says how many processes there are.
    """

    coordinator: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None = None
    told_by: str = "hosts.num_processes"


def join(config: HostsConfig) -> None:
    """Makes this process one of its job, if there are several; before JAX is asked for its devices.

    Raises:
        UserError: what is known of the processes does not suffice, or they do not all come.
    """
    if jax.distributed.is_initialized():
        return  # one of several runs of this process has joined before
    process = find_job_process(config)
    if process is None:
        return
    links = meet(
        process.coordinator, process.num_processes, process.process_id, config.timeout, process.told_by
    )
    # It would take SIGTERM for itself, from the command line that ends this process and with it the others.
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
        # JAX's collectives between CPUs print from C++ with whom they are connected.
        sys.stdout.flush()
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)


def find_job_process(config: HostsConfig) -> JobProcess | None:
    """What the configuration and then the environment say of this process; None if it is alone.

    Raises:
        UserError: something is not known, or its number is none of the job's.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    told_by, devices = "", None
    if config.detect and None in given:
        told_by, (coordinator, num_processes, process_id), devices = _detected(given, config.timeout)
    else:
        coordinator, num_processes, process_id = given
    found = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"hosts.{name}" for name, value in found.items() if value is None]
    if len(missing) == len(found) or num_processes == 1:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"{' and '.join(missing)} must be set too, since the environment does not provide what the other "
            "keys of hosts leave open."
        )
    _check_number(process_id, num_processes)
    if config.num_processes is not None:
        told_by = "hosts.num_processes"
    return JobProcess(coordinator, num_processes, process_id, devices, told_by)


def is_first() -> bool:
    """Whether this is process 0, which alone prints, and writes what is not divided among all."""
    return jax.process_index() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """The others enter when process 0 has left, and find what it has made on a disk that they share."""
    if jax.process_count() == 1:
        yield
        return
    if not is_first():
        wait_for_all("first")
    yield
    if is_first():
        wait_for_all("first")


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here; without their devices, for which some may have to compile first."""
    if jax.process_count() > 1:
        _interruptibly(coordinator_client().wait_at_barrier, _numbered(name), _WAIT_MS)


def check_agreement(values: Mapping[str, Any]) -> None:
    """Raises UserError in a process that has other values than process 0: it would wait for what never comes.

    Args:
        values: what JSON holds, by name; of what is nested, the key that differs is told.
    """
    if jax.process_count() == 1:
        return
    first = from_first(values)
    for name, there, here in differences(first, json.loads(json.dumps(values)), missing="missing"):
        raise UserError(
            f"{name} is {there} in process 0 and {here} in process {jax.process_index()}; all processes must be "
            "started by the same command, and see the same files."
        )


def first_finding(found: str | None) -> str | None:
    """What the first process that found something has found, in all processes; None if none has. Waits for all."""
    return next((text for text in from_all(found) if text), None)


def from_first(value: Any) -> Any:
    """What process 0 gives, in all processes, as JSON holds it."""
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    key = _numbered("first")
    if is_first():
        coordinator_client().key_value_set(key, json.dumps(value))
    return json.loads(_interruptibly(coordinator_client().blocking_key_value_get, key, _WAIT_MS))


def from_all(value: Any) -> list[Any]:
    """What each process gives, by its number, in all processes, as JSON holds it; waits for all."""
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
    """What `call` gives, which waits in C++: in a thread, so that a signal, or another's end, can end the wait here."""
    given: Future[Any] = Future()

    def run() -> None:
        try:
            given.set_result(call(*arguments))
        except BaseException as error:
            given.set_exception(error)

    threading.Thread(target=run, daemon=True, name="waiting for other processes").start()
    while not given.done():
        wait([given], _BETWEEN_LOOKS)  # `_thread.interrupt_main` is seen between two waits only
    return given.result()


def _numbered(name: str) -> str:
    _counter[name] = _counter.get(name, 0) + 1
    return f"{_PREFIX}/{name}/{_counter[name]}"


def _check_number(process_id: int, num_processes: int | None) -> None:
    if process_id < 0 or (num_processes is not None and process_id >= num_processes):
        last = "" if num_processes is None else f" to {num_processes - 1}, one less than hosts.num_processes"
        raise UserError(f"hosts.process_id is {process_id}; accepted: 0{last}.")


def _detected(given: _Known, timeout: int) -> tuple[str, _Known, tuple[int, ...] | None]:
    """What tells of a job (JAX: the first cluster that it knows), `given` completed by it, and the devices there."""
    if _is_alone_in_kubernetes():
        return "", given, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing package, of which the check above has told
        try:
            cluster = cluster_found()
            if cluster is None:
                return "", given, None
            coordinator, num_processes, process_id, devices = completed_by(cluster, *given, timeout)
        except Exception as error:  # whatever a cluster's tools raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"this looks like a job of several processes, but their number cannot be found: {reason}; set "
                "hosts.coordinator, hosts.num_processes and hosts.process_id, or hosts=single."
            ) from None
    own = None if devices is None else _own_devices(devices[0])
    return _CLUSTERS.get(cluster.name, cluster.name), (coordinator, num_processes, process_id), own


def _is_alone_in_kubernetes() -> bool:
    """Whether this is a pod that belongs to no job of several; JAX takes any pod for one that does.

    Raises:
        UserError: it belongs to one, and the package by which JAX asks for its size is not there.
    """
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "TPU_WORKER_HOSTNAMES" in os.environ:
        return False
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is None:
        return True
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            f"this is pod {index} of a Kubernetes job, whose size JAX asks for through a package that is missing: "
            "pip install kubernetes, or set hosts.coordinator, hosts.num_processes and hosts.process_id, or "
            "hosts=single."
        )
    return False


def _own_devices(local_id: int) -> tuple[int, ...] | None:
    """The devices of a process that is the `local_id`th on its host, of those that it sees; None for all.

    All are its own where it is alone on its host, where SLURM shows each its own, and where there are fewer than
    processes; else they are divided evenly. Where nothing says how many there are, JAX's rule holds: one for each.
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
    """How many of the job's processes are on this host, if SLURM or Open MPI says it."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts: list[int] = []  # of each node; SLURM writes 4,4,3 as 4(x2),3
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None
