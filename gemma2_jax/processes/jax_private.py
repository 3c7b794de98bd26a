"""The private parts of JAX that this package uses, in jobs of several processes.

They are imported inside the functions, so that a single process with `hosts=single` runs without them.
"""

from collections.abc import Sequence
from typing import Any


def coordinator_client() -> Any:
    """This process's connection to the coordinator of its job; None before it has joined one.

    The package uses its methods `wait_at_barrier`, `key_value_set`, `blocking_key_value_get` and `key_value_dir_get`.
    """
    # The barriers of the public `jax.experimental.multihost_utils` are collectives on the devices: a process may have
    # to compile first, and the others wait forever if one fails. Without this connection, processes could not wait for
    # process 0 to prepare data, compare their configurations, or report why one of them ended.
    from jax._src import distributed

    return distributed.global_state.client


def cluster_found() -> Any:
    """The first kind of cluster that JAX finds in the environment, a class with a `name`; None if there is none."""
    # `jax.distributed.initialize` finds the cluster too, but does not return which, and fails if there is none. Without
    # this list, SLURM, Open MPI, TPU pods and GKE would not be recognised, and every job would need hosts.coordinator,
    # hosts.num_processes and hosts.process_id.
    from jax._src.clusters import ClusterEnv

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def completed_by(
    cluster: Any, coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """The coordinator, the number of processes, this process's number and its devices.

    Args:
        cluster: the result of `cluster_found`.
        coordinator, num_processes, process_id: given values; None for the cluster's.
        timeout: seconds within which the coordinator's name must be known.
    """
    # `jax.distributed.initialize` would connect at once, before the rendezvous, which reports missing processes.
    from jax._src.clusters import ClusterEnv

    found: tuple[str | None, int | None, int | None, Sequence[int] | None] = (
        ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, cluster.name, timeout
        )
    )
    return found
