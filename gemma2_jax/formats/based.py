"""Checkpoints that hold trained weights alone, read together with the base model that has the frozen ones."""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path

from gemma2_jax.checkpoints import store
from gemma2_jax.config import UserError, build, read_yaml
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.source import WeightSource
from gemma2_jax.model.adaptation import AdaptationConfig


class BasedSource(WeightSource):
    """A checkpoint of trained weights and its base model, read as one model.

    Args:
        path: folder of the checkpoint.
        identity: `source_identity` of the base that it was trained on; None if unknown.
        own_files: the files that hold the trained weights.

    Attributes:
        base: the base model.
        base_name: path of the base model, or its name on the hub.
        identity: as above.
    """

    def __init__(
        self, base: WeightSource, base_name: str, path: Path, identity: str | None, own_files: list[Path]
    ) -> None:
        self.base, self.base_name, self.path, self.identity = base, base_name, path, identity
        self.config, self.tensors, self.metadata = base.config, base.tensors, base.metadata
        self.tokenizer = base.tokenizer
        self._own_files = own_files

    @property
    @abstractmethod
    def trained_parameters(self) -> int:
        """The number of trained parameters."""

    @property
    def files(self) -> list[Path]:
        return sorted({*self.base.files, *self._own_files})

    @property
    def note(self) -> str | None:
        return self.base.note

    def problems(self) -> list[str]:
        return self.base.problems()

    def added_tokens(self, first: int) -> dict[int, str]:
        return self.base.added_tokens(first)

    def check_base(self) -> None:
        """Raises UserError if the weights were trained on another base; reads all weights of the base once."""
        assert self._is_its_base

    @cached_property
    def _is_its_base(self) -> bool:
        check_base(self.path, self.identity, self.base)
        return True


def check_base(path: Path, identity: str | None, base: WeightSource) -> None:
    """Raises UserError if `base` is not the model that the weights at a path were trained on; reads all its weights.

    Args:
        identity: `source_identity` of that model; None if it is unknown.
    """
    if identity is None:
        return
    found = source_identity(base)
    if found != identity:
        raise UserError(
            f"{path} was trained on a base model with the weights {identity[:12]}, but {base.path} has the weights "
            f"{found[:12]}; give the base model that it was trained on."
        )


def settings_of_run(folder: Path) -> AdaptationConfig | None:
    """The adaptation of the run in a folder; None if it holds no run. (Other tools have a config.yaml too.)"""
    path = folder / store.CONFIG_FILE
    if not (path.is_file() and (folder / store.FOLDER).exists()):
        return None
    found = read_yaml(path).get("adaptation") or {}
    if not isinstance(found, dict):
        raise UserError(f"{path} has a section `adaptation` that is not one.")
    return build(AdaptationConfig, found, f"{path}, adaptation")
