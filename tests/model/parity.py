"""What is compared with another implementation of Gemma 2: everything that a model computes, by name."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.data.batch import Batch
from gemma2_jax.formats.layouts import HUGGINGFACE, WeightPlace, expand
from gemma2_jax.formats.load import load_params
from gemma2_jax.formats.source import ForeignSource, TensorInfo
from gemma2_jax.kernels.lm_head import lm_head_sums
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.objectives.objective import evaluation_loss
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler

# Of the largest entry of what is compared: the logits, the states after one layer, one weight's gradient.
TOLERANCE = 1e-4
NEW_TOKENS = 200

Observed = dict[str, np.ndarray]


class InMemory(ForeignSource):
    """Weights in Hugging Face's names and layout, as a checkpoint."""

    kind = "in memory"
    path = Path("memory")
    tokenizer = None

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.tensors = {
            name: TensorInfo(array.shape, array.dtype.name, self.path) for name, array in weights.items()
        }
        self._weights = weights
        super().__init__(HUGGINGFACE)

    def read(self, name: str) -> np.ndarray:
        return self._weights[name]


def imported(source: ForeignSource) -> Gemma2:
    """The float32 model that our import makes of a checkpoint."""
    return Gemma2(source.config, load_params(source, source.config, "float32"))


def in_their_layout(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, by Hugging Face's names."""

    def part(place: WeightPlace) -> np.ndarray:
        value: Any = params
        for key in place.path.split("/"):
            value = value[key]
        return np.asarray(value if place.pair is None else value[place.pair])

    return {
        name: entry.join([part(place) for place in entry.places])
        for name, entry in expand(HUGGINGFACE, weight_specs(config)).items()
    }


def batch_of(rows: Sequence[Sequence[int]], length: int, vocab_size: int, left: bool = False) -> Batch:
    """Random documents of these lengths, packed into rows; what they leave is padding, after them or before."""
    draw = np.random.default_rng(7)
    tokens, targets, positions, segment_ids = np.zeros((4, len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = length - sum(documents) if left else 0
        for segment, size in enumerate(documents, 1):
            here = (row, slice(start, start + size))
            document = draw.integers(0, vocab_size, size + 1)
            tokens[here], targets[here] = document[:-1], document[1:]
            positions[here], segment_ids[here] = np.arange(size), segment
            start += size
    return Batch(tokens, targets, positions, segment_ids, loss_mask=(segment_ids > 0).astype(np.float32))


def prompts_of(vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts far shorter than the window of 8, just shorter and far longer."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab_size, length).tolist() for length in (2, 7, 45)]


def documents(batch: Batch) -> Iterable[tuple[int, slice]]:
    """The row and the columns of each document of a batch."""
    for row, ids in enumerate(batch.segment_ids):
        for segment in range(1, ids.max() + 1):
            columns = np.flatnonzero(ids == segment)
            yield row, slice(columns[0], columns[-1] + 1)


def read(model: Gemma2, batch: Batch) -> Observed:
    """Logits, and the hidden states after the embedding, after every layer and after the last norm."""

    positions, segment_ids = batch.positions, batch.segment_ids
    layer = jax.jit(lambda block, x: block(x, lambda attend, x: attend(x, positions, segment_ids))[0])
    states = [model.embedder.encode(batch.tokens, jnp.float32)]
    for index in range(model.config.num_pairs):
        pair = jax.tree.map(lambda weight, index=index: weight[index], model.pairs)
        states.append(layer(pair.local_block, states[-1]))
        states.append(layer(pair.global_block, states[-1]))
    states.append(model.final_norm(states[-1]))
    found = {f"hidden/{index}": state for index, state in enumerate(states)}
    found["logits"] = jax.jit(lambda model: model(batch.tokens, positions, segment_ids))(model)
    return {name: np.where(segment_ids[:, :, None] > 0, array, 0) for name, array in found.items()}


def learn(model: Gemma2, batch: Batch) -> Observed:
    """The mean loss of the batch's targets, and its gradient in every weight, through the blockwise loss."""

    def loss(params: Any) -> jax.Array:
        ours = Gemma2(model.config, params)
        hidden = ours.hidden(batch.tokens, batch.positions, batch.segment_ids)
        total, _ = lm_head_sums(
            evaluation_loss, {"model": ours.head(hidden)}, {"targets": batch.targets}, batch.loss_mask, 48
        )
        return total / jnp.sum(batch.loss_mask)

    value, gradients = jax.jit(jax.value_and_grad(loss))(model.params())
    named = in_their_layout(model.config, gradients)
    return {"loss": np.asarray(value), **{f"gradient/{name}": array for name, array in named.items()}}


def continued(model: Gemma2, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """NEW_TOKENS greedy tokens after each prompt, read in one batch by our sampler."""
    # With ids as input and output, the sampler uses only the tokenizer's number of ids.
    ids_only: Any = SimpleNamespace(vocab_size=model.config.num_tokens)
    greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_tokens=())
    return Sampler(model, ids_only).generate_tokens(prompts, greedy)


def errors(found: Observed, expected: Observed) -> dict[str, float]:
    """The largest error of each array, relative to the largest entry that it should have."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    return {
        name: float(np.max(np.abs(found[name] - expected[name])) / np.max(np.abs(expected[name])))
        for name in expected
    }
