"""LoRA adapters: those of our run folders and of PEFT's folders, beside or merged into their base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError
from gemma2_jax.formats import hub, peft
from gemma2_jax.formats.base_record import BASE_FILE, read_base_record
from gemma2_jax.formats.based import BasedSource, settings_of_run
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.metadata import load_metadata
from gemma2_jax.formats.source import WeightSource, files_below
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.linear import merged
from gemma2_jax.model.lora import Lora, adapter_specs
from gemma2_jax.model.weights import Specs, abstract_params, insert, specs_by_path, value_at, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: its folder.
        settings: its rank, scale and targets.
        identity: `source_identity` of its base; None if the folder does not say.
        matrices: A [in…, R] and B [R, out…] of each adapted weight of a layer, as NumPy arrays.
        files: the files that hold the matrices.
    """

    path: Path
    settings: AdaptationConfig
    identity: str | None
    matrices: Mapping[WeightPlace, tuple[np.ndarray, np.ndarray]]
    files: list[Path]

    def stacked(self, config: ModelConfig) -> tuple[Specs, dict[str, Any]]:
        """Specs and float32 arrays of A and B, laid out like `Lora.adapter`; layers without an adapter have zeros."""
        assert self.settings.rank is not None
        weights = specs_by_path(weight_specs(config))
        specs: Specs = {}
        arrays: dict[str, Any] = {}
        for path in dict.fromkeys(place.path for place in self.matrices):
            both = adapter_specs(weights[path], self.settings.rank, config.num_pairs)
            found = {name: np.zeros(spec.shape, np.float32) for name, spec in both.items()}
            for pair in range(config.num_pairs):
                for name, matrix in zip("ab", self.matrices.get(WeightPlace(path, pair), ()), strict=False):
                    found[name][pair] = matrix
            insert(specs, path, both)
            insert(arrays, path, found)
        return specs, arrays


def has_base(folder: Path) -> bool:
    """Whether a folder holds trained weights without their base model: a run with frozen weights, or PEFT's adapter."""
    settings = settings_of_run(folder)
    return peft.is_adapter_alone(folder) if settings is None else settings.has_base


def base_of(folder: Path) -> str:
    """The path of the base model, or its name on the hub, if `has_base`. Raises UserError if the folder lacks both."""
    if settings_of_run(folder) is not None:
        return read_base_record(folder).source
    base = peft.read_settings(folder).base
    if base is None:
        raise UserError(
            f"{folder / peft.CONFIG_FILE} has no base_model_name_or_path; name the base model, as in gemma2 generate "
            f"--checkpoint BASE --adapter {folder}, or gemma2 convert {folder} TARGET --merge --base BASE."
        )
    return base


def read_adapter(folder: str | Path, config: ModelConfig, averaged: bool = False) -> Adapter:
    """Reads the adapter in a folder of `train` or of PEFT, or on the hub, for a base model of these sizes.

    Args:
        averaged: whether to take the average of a run's adapter over the steps (`training.ema`).

    Raises:
        UserError: there is none, it is damaged, it belongs to a model of other sizes, or it is no LoRA adapter.
    """
    path = hub.download(str(folder)) if hub.is_remote(str(folder)) else Path(folder)
    ours = settings_of_run(path)
    if ours is not None and ours.is_adapter:
        return _read_run(path, ours, config, store.AVERAGED if averaged else store.PARAMS)
    if averaged:
        raise UserError(
            f"{path} is not a run folder, and only a run keeps an average of its weights; leave out --averaged."
        )
    if (path / peft.CONFIG_FILE).is_file():
        settings, identity, matrices = peft.read(path, config)
        return Adapter(path, settings, identity, matrices, [path / peft.WEIGHTS_FILE])
    if not path.exists():
        raise UserError(f"{path} does not exist; an adapter's folder is expected.")
    raise UserError(
        f"{path} holds no adapter; accepted: a run folder of a training with adaptation=lora, or PEFT's folder with "
        f"{peft.CONFIG_FILE} and {peft.WEIGHTS_FILE}."
    )


class AdaptedSource(BasedSource):
    """An adapter and its base model, read as the merged model: W + s A B in float32."""

    def __init__(self, base: WeightSource, base_name: str, adapter: Adapter) -> None:
        super().__init__(base, base_name, adapter.path, adapter.identity, adapter.files)
        self.adapter = adapter
        self.kind = f"LoRA adapter on {base.kind}"
        if (adapter.path / BASE_FILE).exists():
            self.metadata = load_metadata(adapter.path)

    @property
    def trained_parameters(self) -> int:
        return sum(a.size + b.size for a, b in self.adapter.matrices.values())

    def weight(self, place: WeightPlace) -> np.ndarray:
        self.check_base()
        weight = self.base.weight(place)
        if place not in self.adapter.matrices:
            return weight
        a, b = self.adapter.matrices[place]
        found: np.ndarray = merged(weight, a, b, self.adapter.settings.scale)
        return found

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        if place in self.adapter.matrices:
            return self.weight(place)[rows]
        self.check_base()
        return self.base.rows(place, rows)


def _read_run(folder: Path, settings: AdaptationConfig, config: ModelConfig, tree: str) -> Adapter:
    assert settings.rank is not None
    lora = Lora(config, settings.rank, settings.scale, settings.targets, settings.layers)
    mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    found = store.find_params(folder, tree)
    params = store.read_params(found, abstract_params(lora.adapter, mesh=mesh), tree)
    weights = specs_by_path(lora.adapter)
    matrices = {}
    for path in dict.fromkeys(name.rsplit("/", 1)[0] for name in weights):
        a, b = (np.asarray(value_at(params, f"{path}/{name}")) for name in "ab")
        for index, pair in enumerate(lora.pairs_of(path)):
            matrices[WeightPlace(path, pair)] = a[index], b[index]
    return Adapter(
        folder, settings, read_base_record(folder).identity, matrices, files_below([found.path / tree])
    )
