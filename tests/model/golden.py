"""The golden files' form: a model's weights, inputs, and what the reference computes of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from gemma2_jax.data.batch import Batch
from gemma2_jax.formats.layouts import HUGGINGFACE, expand
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import weight_specs
from tests.model.models import shrunk
from tests.model.parity import Observed

FOLDER = Path(__file__).parents[1] / "golden"
ROWS = [field.name for field in fields(Batch) if field.name != "extra"]
# The smallest sizes that transformers accepts: it needs integer query scales, and heads that divide d_model.
SMALLEST = {
    "2b": dict(num_heads=2, head_dim=8),
    "9b": dict(num_heads=4, head_dim=8),
    "27b": dict(num_heads=2, head_dim=8),
}


@dataclass(frozen=True)
class Golden:
    """One file.

    Attributes:
        weights: by Hugging Face's names, int8 times a power of two.
        observed: as `parity.read` and `parity.learn` name it, of `batch`.
        continuations: the greedy tokens after each of `prompts`.
    """

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    batch: Batch
    observed: Observed
    prompts: list[list[int]]
    continuations: list[list[int]]

    def save(self, path: Path) -> None:
        names = expand(HUGGINGFACE, weight_specs(self.config))
        units = np.array([_unit(self.weights[name]) for name in names], np.float32)
        whole = [self.weights[name] / unit for name, unit in zip(names, units, strict=True)]
        states = [self.observed[f"hidden/{index}"] for index in range(self.config.num_layers + 2)]
        np.savez_compressed(
            path,
            weights=_flat(whole).astype(np.int8),
            units=units,
            gradients=_flat([self.observed[f"gradient/{name}"] for name in names]),
            hidden=np.stack(states),
            logits=self.observed["logits"],
            loss=self.observed["loss"],
            **{name: getattr(self.batch, name) for name in ROWS},
            prompts=_flat([np.array(prompt, np.int16) for prompt in self.prompts]),
            prompt_lengths=np.array([len(prompt) for prompt in self.prompts]),
            continuations=np.array(self.continuations, np.int16),
        )

    @classmethod
    def load(cls, name: str) -> "Golden":
        """That of a released size."""
        config = shrunk(name, **SMALLEST[name])
        entries = expand(HUGGINGFACE, weight_specs(config))
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            shapes = {name: entry.shape for name, entry in entries.items()}
            units = dict(zip(entries, file["units"], strict=True))
            weights = {name: part * units[name] for name, part in _parts(file["weights"], shapes)}
            observed = {f"gradient/{name}": part for name, part in _parts(file["gradients"], shapes)}
            observed |= {f"hidden/{index}": state for index, state in enumerate(file["hidden"])}
            observed |= {name: file[name] for name in ("logits", "loss")}
            batch = Batch(**{name: file[name] for name in ROWS})
            ends = np.cumsum(file["prompt_lengths"])
            prompts = [part.tolist() for part in np.split(file["prompts"], ends[:-1])]
            return cls(config, weights, batch, observed, prompts, file["continuations"].tolist())


def _unit(weight: np.ndarray) -> float:
    """The power of two that a weight is whole multiples of, of -127 to 127."""
    unit = 2.0 ** np.ceil(np.log2(np.abs(weight).max() / 127))
    assert np.array_equal(np.round(weight / unit) * unit, weight)
    return float(unit)


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _parts(flat: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of these shapes that lie one behind another in `flat`."""
    assert len(flat) == sum(int(np.prod(shape)) for shape in shapes.values())
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        yield name, flat[start : start + size].reshape(shape)
        start += size
