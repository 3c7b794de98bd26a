"""What this package uses of JAX's private modules, in jobs of several processes.

They are imported where they are used, so that a single process with `hosts=single` runs without them.
"""

from collections.abc import Sequence
from typing import Any


def coordinator_client() -> Any:
    """This process's connection to the coordinator of its job; None before it has joined one.

    Of its methods, `wait_at_barrier`, `key_value_set`, `blocking_key_value_get` and `key_value_dir_get` are used.
    """
    # The public `jax.experimental.multihost_utils` has processes wait for one another by a collective on their devices,
    # for which some may have to compile first, and which never ends where one of them fails. Without this connection,
    # processes can neither wait for process 0 to prepare data, nor compare their configurations, nor say why one ended.
    from jax._src import distributed

    return distributed.global_state.client


def cluster_found() -> Any:
    """The first kind of cluster that JAX finds in the environment, a class with a `name`; None if there is none."""
    # `jax.distributed.initialize` finds the cluster too, but does not say which, and fails where there is none. Without
    # this list, SLURM, Open MPI, TPU pods and GKE are not found, and a job needs hosts.coordinator,
    # hosts.num_processes and hosts.process_id.
    from jax._src.clusters import ClusterEnv

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def completed_by(
    cluster: Any, coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """The coordinator, the number of processes and this one's, where given, else as the cluster has them; and devices.

    Args:
        cluster: as `cluster_found` gives it; timeout: in seconds, for the coordinator's name to be known.
    """
    # As above: `jax.distributed.initialize` joins at once, before the processes have met under a time limit and shown
    # by a sentence who is missing.
    from jax._src.clusters import ClusterEnv

    found: tuple[str | None, int | None, int | None, Sequence[int] | None] = (
        ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, cluster.name, timeout
        )
    )
    return found
