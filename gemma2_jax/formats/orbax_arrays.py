"""The arrays in a folder of Orbax, which are read with TensorStore, whole or in part."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma2_jax.config import UserError
from gemma2_jax.messages import one_line

# The metadata file of each array, and TensorStore's driver.
_METADATA_FILES = {"/.zarray": "zarr", "/zarr.json": "zarr3"}


class OrbaxArrays:
    """The arrays in a folder.

    Args:
        folder: folder with one tree of arrays.

    Attributes:
        drivers: TensorStore's driver for each array, by the array's stored name, such as `layer_0.mlp`.

    Raises:
        ValueError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Not a URL, in which characters such as % and # would have to be escaped.
        files = {"driver": "file", "path": f"{folder.absolute()}/"}
        is_ocdbt = (folder / "manifest.ocdbt").exists()
        self._store: dict[str, Any] = {"driver": "ocdbt", "base": files} if is_ocdbt else files
        keys = [key.decode() for key in ts.KvStore.open(self._store).result().list().result()]
        self.drivers = {
            key.removesuffix(ending): driver
            for key in keys
            for ending, driver in _METADATA_FILES.items()
            if key.endswith(ending)
        }

    def open(self, name: str) -> Any:
        """Returns an array's TensorStore, from which no value is read yet. Raises ValueError if it is damaged."""
        return ts.open(
            {
                "driver": self.drivers[name],
                "kvstore": {**self._store, "path": f"{self._store.get('path', '')}{name}/"},
                "fill_missing_data_reads": False,  # a lost file would be read as zeros
            }
        ).result()

    def read(self, name: str, part: Any = ..., shown_as: str | None = None) -> np.ndarray:
        """Returns an array, or the part with this index.

        Raises:
            UserError: it cannot be read; the message calls it `shown_as`, by default its stored name.
        """
        try:
            return np.asarray(self.open(name)[part].read().result())
        except ValueError as error:
            raise UserError(
                f"{self._folder}: {shown_as or name} cannot be read: {one_line(error)}."
            ) from None
