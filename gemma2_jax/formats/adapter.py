"""LoRA adapters: those of our run folders and of PEFT's folders, beside or merged into their base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError, build, read_yaml
from gemma2_jax.formats import hub, peft
from gemma2_jax.formats.base_record import BASE_FILE, read_base_record
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.metadata import load_metadata
from gemma2_jax.formats.source import WeightSource, files_below
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.linear import merged
from gemma2_jax.model.lora import Lora, adapter_specs, insert
from gemma2_jax.model.weights import Specs, abstract_params, specs_by_path, weight_specs
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


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter: a run of `train` with one, or PEFT's."""
    return _is_run(folder) or peft.is_adapter_alone(folder)


def base_of(folder: Path) -> str:
    """The path of an adapter's base model, or its name on the hub. Raises UserError if the folder does not say."""
    if _is_run(folder):
        return read_base_record(folder).source
    base = peft.read_settings(folder).base
    if base is None:
        raise UserError(
            f"{folder / peft.CONFIG_FILE} has no base_model_name_or_path; name the base model, as in gemma2 generate "
            f"--checkpoint BASE --adapter {folder}, or gemma2 convert {folder} TARGET --merge --base BASE."
        )
    return base


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Reads the adapter in a folder of `train` or of PEFT, or on the hub, for a base model of these sizes.

    Raises:
        UserError: there is none, it is damaged, it belongs to a model of other sizes, or it is no LoRA adapter.
    """
    path = hub.download(str(folder)) if hub.is_remote(str(folder)) else Path(folder)
    if _is_run(path):
        return _read_run(path, config)
    if (path / peft.CONFIG_FILE).is_file():
        settings, identity, matrices = peft.read(path, config)
        return Adapter(path, settings, identity, matrices, [path / peft.WEIGHTS_FILE])
    if not path.exists():
        raise UserError(f"{path} does not exist; an adapter's folder is expected.")
    raise UserError(
        f"{path} holds no adapter; accepted: a run folder of a training with adaptation=lora, or PEFT's folder with "
        f"{peft.CONFIG_FILE} and {peft.WEIGHTS_FILE}."
    )


def check_base(adapter: Adapter, base: WeightSource) -> None:
    """Raises UserError if an adapter was trained on another model than `base`; reads all weights of `base`."""
    if adapter.identity is None:
        return
    identity = source_identity(base)
    if identity != adapter.identity:
        raise UserError(
            f"{adapter.path} holds an adapter for a base model with the weights {adapter.identity[:12]}, but "
            f"{base.path} has the weights {identity[:12]}; give the base model that it was trained on."
        )


class AdaptedSource(WeightSource):
    """An adapter and its base model, read as the merged model: W + s A B in float32.

    Attributes:
        base: the base model.
        adapter: the adapter.
        base_name: path of the base model, or its name on the hub.
    """

    def __init__(self, base: WeightSource, adapter: Adapter, base_name: str) -> None:
        self.base, self.adapter, self.base_name = base, adapter, base_name
        self.kind = f"LoRA adapter on {base.kind}"
        self.path, self.config, self.tensors = adapter.path, base.config, base.tensors
        self.tokenizer = base.tokenizer
        is_run = (adapter.path / BASE_FILE).exists()
        self.metadata = load_metadata(adapter.path) if is_run else base.metadata

    @property
    def files(self) -> list[Path]:
        return sorted({*self.base.files, *self.adapter.files})

    def problems(self) -> list[str]:
        return self.base.problems()

    def added_tokens(self, first: int) -> dict[int, str]:
        return self.base.added_tokens(first)

    def weight(self, place: WeightPlace) -> np.ndarray:
        self.check_base()
        weight = self.base.weight(place)
        if place not in self.adapter.matrices:
            return weight
        a, b = self.adapter.matrices[place]
        found: np.ndarray = merged(weight, a, b, self.adapter.settings.scale)
        return found

    def check_base(self) -> None:
        """Raises UserError if the adapter was trained on another base; reads all weights once."""
        assert self._is_its_base

    @cached_property
    def _is_its_base(self) -> bool:
        check_base(self.adapter, self.base)
        return True


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run with an adapter. (Other tools have a config.yaml too.)"""
    is_run = (folder / store.CONFIG_FILE).is_file() and (folder / store.FOLDER).exists()
    return is_run and _settings_of_run(folder).is_adapter


def _settings_of_run(folder: Path) -> AdaptationConfig:
    path = folder / store.CONFIG_FILE
    found = read_yaml(path).get("adaptation") or {}
    if not isinstance(found, dict):
        raise UserError(f"{path} has a section `adaptation` that is not one.")
    return build(AdaptationConfig, found, f"{path}, adaptation")


def _read_run(folder: Path, config: ModelConfig) -> Adapter:
    settings = _settings_of_run(folder)
    assert settings.rank is not None
    lora = Lora(config, settings.rank, settings.scale, settings.targets, settings.layers)
    mesh = build_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    found = store.find_params(folder)
    params = store.read_params(found, abstract_params(lora.adapter, mesh=mesh))
    weights = specs_by_path(lora.adapter)
    matrices = {}
    for path in dict.fromkeys(name.rsplit("/", 1)[0] for name in weights):
        a, b = (np.asarray(_leaf(params, f"{path}/{name}")) for name in "ab")
        for index, pair in enumerate(lora.pairs_of(path)):
            matrices[WeightPlace(path, pair)] = a[index], b[index]
    return Adapter(
        folder, settings, read_base_record(folder).identity, matrices, files_below([found.path / "params"])
    )


def _leaf(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
