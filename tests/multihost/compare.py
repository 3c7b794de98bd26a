"""One process of several: fails unless its parts of a run's weights are bit-equal to those in a file.

python compare.py RUN PARAMS.npz hosts.KEY=VALUE …
"""

import sys

import jax
import numpy as np

from gemma2_jax.checkpoints.store import restore_params
from gemma2_jax.cli.compose import compose
from gemma2_jax.config import load_config
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.processes.ending import leave
from gemma2_jax.processes.hosts import join
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

run, params, *hosts = sys.argv[1:]
join(compose(hosts).hosts)
assert jax.process_count() > 1
mesh = build_mesh(MeshConfig(data=1, fsdp=-1, tensor=1))
config = load_config(RunConfig, f"{run}/config.yaml")
with jax.set_mesh(mesh):
    leaves = jax.tree.leaves(
        restore_params(run, abstract_params(weight_specs(config.model), "float32", mesh))
    )
with np.load(params) as expected:
    assert len(expected.files) == len(leaves)
    for name, leaf in zip(expected.files, leaves, strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index], strict=True)
leave(0, None)
assert any(not leaf.is_fully_replicated for leaf in leaves)
