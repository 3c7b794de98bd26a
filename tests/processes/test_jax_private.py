"""The private names of JAX that `processes/jax_private.py` uses."""

import pytest
from jax._src.lib import _jax

from gemma2_jax.processes import hosts
from gemma2_jax.processes.jax_private import cluster_found, coordinator_client
from tests.private_names import private

NO_JOBS = (
    "several processes can neither wait for one another nor say why one ended; see processes/jax_private.py"
)
NOT_FOUND = (
    "jobs of SLURM, Open MPI, TPU pods and GKE are not found, and need hosts.coordinator, hosts.num_processes and "
    "hosts.process_id; see processes/jax_private.py"
)


def test_the_coordinators_client() -> None:
    private("jax", "jax._src.distributed:global_state.client", NO_JOBS)
    assert coordinator_client() is None  # of a process that has joined no job
    for method in ("wait_at_barrier", "key_value_set", "blocking_key_value_get", "key_value_dir_get"):
        assert hasattr(_jax.DistributedRuntimeClient, method), f"JAX's client has no {method}: {NO_JOBS}"


def test_the_kinds_of_clusters() -> None:
    kinds = private("jax", "jax._src.clusters:ClusterEnv._cluster_types", NOT_FOUND)
    assert {kind.name for kind in kinds} >= {"slurm", "ompi", "gcetpu", "gketpu"}, NOT_FOUND
    for kind in kinds:
        assert kind.opt_in_only_method in (True, False), NOT_FOUND
    private("jax", "jax._src.clusters:ClusterEnv.is_env_present", NOT_FOUND, [])
    kubernetes = private("jax", "jax._src.clusters.k8s_cluster:K8sCluster", NOT_FOUND)
    assert hosts._CLUSTERS[kubernetes.name] == "Kubernetes"


def test_what_a_cluster_completes() -> None:
    names = [
        "coordinator_address", "num_processes", "process_id", "local_device_ids", "cluster_detection_method",
        "initialization_timeout",
    ]  # fmt: skip
    place = "jax._src.clusters:ClusterEnv.auto_detect_unset_distributed_params"
    private("jax", place, NOT_FOUND, names)


def test_a_kind_that_is_asked_for_only_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import ClusterEnv

    class Kind:
        name = "kind"
        opt_in_only_method = True

        @staticmethod
        def is_env_present() -> bool:
            return True

    class Other(Kind):
        opt_in_only_method = False

    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Kind])
    assert cluster_found() is None
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Kind, Other])
    assert cluster_found() is Other
