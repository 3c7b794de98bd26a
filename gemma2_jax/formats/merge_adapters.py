"""Merges LoRA adapters of one base model into one, exactly: their matrices side by side, at the sum of their ranks."""

from collections.abc import Sequence

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats.adapter import AdaptedSource, Adapter
from gemma2_jax.formats.based import check_base
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.source import WeightSource
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.lora import TARGETS


def merge_adapters(sources: Sequence[WeightSource], weights: Sequence[float]) -> AdaptedSource:
    """Returns an adapter that changes each weight by the weighted sum of the changes of several adapters.

    Args:
        sources: adapters, each with its base model.
        weights: one number per adapter.

    Raises:
        UserError: a source is not an adapter, or the adapters have different base models.
    """
    adapted = [_adapted(source) for source in sources]
    first = adapted[0]
    for source in adapted:
        source.check_base()
        if source.identity is not None and first.identity is not None and source.identity != first.identity:
            raise UserError(
                f"{first.path} is an adapter for {first.base_name} with the weights {first.identity[:12]}, but "
                f"{source.path} is one for {source.base_name} with the weights {source.identity[:12]}; leave one of "
                "them out, or merge complete models, without --to peft."
            )
        check_base(source.path, source.identity, first.base)
    adapters = [source.adapter for source in adapted]
    places = dict.fromkeys(place for adapter in adapters for place in adapter.matrices)
    merged = {place: _side_by_side(place, adapters, weights) for place in places}
    layers = {number for source in adapted for number in _layers(source)}
    rank = sum(adapter.settings.rank or 0 for adapter in adapters)
    settings = AdaptationConfig(
        "lora",
        rank,
        float(rank),  # so that the scale is 1
        targets=tuple(name for name in TARGETS if any(name in each.settings.targets for each in adapters)),
        layers=None if len(layers) == first.config.num_layers else tuple(sorted(layers)),
    )
    identity = next((source.identity for source in adapted if source.identity is not None), None)
    files = [file for adapter in adapters for file in adapter.files]
    return AdaptedSource(first.base, first.base_name, Adapter(first.path, settings, identity, merged, files))


def _adapted(source: WeightSource) -> AdaptedSource:
    if not isinstance(source, AdaptedSource):
        raise UserError(
            f"{source.path} is not a LoRA adapter, and --to peft merges adapters; leave out --to peft to merge "
            "complete models."
        )
    return source


def _layers(source: AdaptedSource) -> Sequence[int]:
    layers = source.adapter.settings.layers
    return range(source.config.num_layers) if layers is None else layers


def _side_by_side(
    place: WeightPlace, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [in…, R] and B [R, out…] for the sum R of the ranks; an adapter without this weight has zeros."""
    sides = next(adapter.matrices[place] for adapter in adapters if place in adapter.matrices)
    into, out = sides[0].shape[:-1], sides[1].shape[1:]
    left, right = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        rank = adapter.settings.rank or 0
        a, b = adapter.matrices.get(place, (np.zeros((*into, rank)), np.zeros((rank, *out))))
        left.append(a.astype(np.float32))
        right.append(np.float32(weight * adapter.settings.scale) * b.astype(np.float32))
    return np.concatenate(left, axis=-1), np.concatenate(right, axis=0)
