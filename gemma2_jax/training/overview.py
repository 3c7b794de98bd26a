"""A summary of a run in a few lines, shown before its first step: sizes, data, devices."""

from collections.abc import Sequence

from jax.sharding import Mesh

from gemma2_jax.data.prepared_settings import cut_note
from gemma2_jax.data.shards import read_data_manifest
from gemma2_jax.model.adaptation import divided_specs
from gemma2_jax.model.counts import count_parameters, count_weights
from gemma2_jax.model.qat import fallback_lines
from gemma2_jax.run import RunConfig


def describe_adaptation(config: RunConfig) -> list[str]:
    """Lines about the trained part of a model, and about rounding; none if all weights are trained without it."""
    settings = config.adaptation
    if settings.quantize is not None:
        notes = [
            f"trained as {settings.quantize} rounds it",
            *fallback_lines(config.model, settings.quantize),
        ]
        return [f"{config.name}: {note}" for note in notes]
    if not settings.has_base:
        return []
    trained = count_weights(divided_specs(settings, config.model)[0])
    share = f"{trained / count_parameters(config.model).total:.2%} of the model's"
    layers = "all layers" if settings.layers is None else f"{len(settings.layers)} layers"
    if settings.is_adapter:
        text = f"{trained:,} parameters of an adapter, {share}: rank {settings.rank}, on {', '.join(settings.targets)}"
    else:
        text = f"{trained:,} parameters, {share}: {', '.join(settings.weights)}"
    beside = "" if settings.base is None else f", beside a base in {settings.base}"
    return [f"{config.name}: trains only {text} of {layers}{beside}"]


def describe_runs(configs: Sequence[RunConfig], mesh: Mesh) -> list[str]:
    """One or two lines for each run, then one for the data and one for the devices that all runs share."""
    data = configs[0].data
    lines = []
    for config in configs:
        lines.append(
            f"{config.name}: {count_parameters(config.model).total:,} parameters, {config.training.steps:,} steps of "
            f"{data.batch_size} x {data.seq_len} tokens, in {config.output}"
        )
        lines += describe_adaptation(config)
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
