"""Runs of adaptation=partial: their checkpoints hold the trained weights, and the base model has the others."""

from pathlib import Path

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.formats.base_record import read_base_record
from gemma2_jax.formats.based import BasedSource
from gemma2_jax.formats.layouts import EMBEDDING, WeightPlace
from gemma2_jax.formats.metadata import load_metadata
from gemma2_jax.formats.source import WeightSource, files_below
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.partial import Partial
from gemma2_jax.model.weights import abstract_params, specs_by_path, value_at, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


class PartialSource(BasedSource):
    """A run of adaptation=partial and its base model, read as the trained model.

    Args:
        averaged: whether to take the average of the trained weights over the steps (`training.ema`).
    """

    def __init__(
        self,
        base: WeightSource,
        base_name: str,
        folder: Path,
        settings: AdaptationConfig,
        averaged: bool = False,
    ) -> None:
        tree = store.AVERAGED if averaged else store.PARAMS
        config, found = store.load_model_config(folder), store.find_params(folder, tree)
        super().__init__(
            base, base_name, folder, read_base_record(folder).identity, files_below([found.path / tree])
        )
        self.kind = f"trained part of {base.kind}"
        self.metadata = load_metadata(folder)
        partial = Partial(config, settings.weights, settings.layers)
        specs = partial.specs(weight_specs(config))[0]
        mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
        params = store.read_params(found, abstract_params(specs, mesh=mesh), tree)
        self._trained: dict[WeightPlace, np.ndarray] = {}
        for path, spec in specs_by_path(specs).items():
            weight = np.asarray(value_at(params, path))
            if spec.dims.startswith("P"):
                for pair, layer in zip(partial.pairs_of(path), weight, strict=True):
                    self._trained[WeightPlace(path, pair)] = layer
            else:
                self._trained[WeightPlace(path, None)] = weight
        if WeightPlace(EMBEDDING, None) in self._trained:
            self.config = config  # whose padding of the vocabulary may differ from the base's

    @property
    def trained_parameters(self) -> int:
        return sum(weight.size for weight in self._trained.values())

    def weight(self, place: WeightPlace) -> np.ndarray:
        self.check_base()
        return self._trained[place] if place in self._trained else self.base.weight(place)

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        self.check_base()
        return self._trained[place][rows] if place in self._trained else self.base.rows(place, rows)
