"""One process of several: saves into two stores by turns, without waiting for either, and leaves.

python saving.py FOLDER hosts.KEY=VALUE …
"""

import sys

import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gemma2_jax.checkpoints.store import CheckpointStore
from gemma2_jax.cli.compose import compose
from gemma2_jax.processes.ending import leave
from gemma2_jax.processes.hosts import join
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

folder, *hosts = sys.argv[1:]
join(compose(hosts).hosts)
assert jax.process_count() > 1
split = NamedSharding(build_mesh(MeshConfig(data=1, fsdp=-1)), PartitionSpec("fsdp"))
numbers = jax.make_array_from_callback((1024, 64), split, lambda index: jnp.ones((1024, 64))[index])
iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
with CheckpointStore(f"{folder}/one", keep=2) as one, CheckpointStore(f"{folder}/other", keep=2) as other:
    for step in range(1, 13):
        for store in (one, other):
            store.save(step, {"params": {"numbers": numbers}}, iterator, {})
leave(0, None)
