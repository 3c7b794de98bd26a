"""A summary of a run in a few lines, shown before its first step: sizes, data, devices."""

from collections.abc import Sequence

from jax.sharding import Mesh

from gemma2_jax.data.prepared_settings import cut_note
from gemma2_jax.data.shards import read_data_manifest
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.run import RunConfig


def describe_runs(configs: Sequence[RunConfig], mesh: Mesh) -> list[str]:
    """One line for each run, then one for the data and one for the devices that all runs share."""
    data = configs[0].data
    lines = [
        f"{config.name}: {count_parameters(config.model).total:,} parameters, {config.training.steps:,} steps of "
        f"{data.batch_size} x {data.seq_len} tokens, in {config.output}"
        for config in configs
    ]
    manifest = read_data_manifest(data.folder)
    lines.append(
        f"data: {manifest.train.tokens:,} tokens to train on, {manifest.validation.tokens:,} held out, in {data.folder}"
    )
    if manifest.conversations is not None:
        lengths = manifest.train_lengths
        lines.append(
            f"conversations: {lengths.conversations:,} to train on, with loss on {lengths.loss_tokens:,} tokens"
        )
        if note := cut_note(manifest, data):
            lines.append(f"conversations: {note}")
    devices = mesh.devices.flat
    split = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    processes = len({device.process_index for device in devices})
    lines.append(
        f"devices: {mesh.size} x {devices[0].device_kind}"
        + (f", {split}" if split else "")
        + (f", {processes} processes" if processes > 1 else "")
    )
    return lines
