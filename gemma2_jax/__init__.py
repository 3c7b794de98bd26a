"""Gemma 2 in JAX: train it, distil it, look at it.

Dimensions have the same letters in every einsum, comment and shape, and in the keys of `layout`:

    B  batch          T  position (of queries)   S  position of keys   D  model width
    N  query heads    K  key/value heads         G  query heads to each key/value head (N = K * G)
    H  head width     F  feed-forward width      V  vocabulary
    L  layers         P  (local, global) pairs of layers
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

from gemma2_jax.virtual_devices import enlarge_thread_pool

enlarge_thread_pool()  # here, because JAX must not have used its devices before

# The public API, each name loaded when it is first used: `import gemma2_jax` itself is fast.
_PLACES = {
    "compose": "cli.compose",  # key=value to the configuration of a run
    "prepare": "data.prepare",  # its data and tokenizer
    "train_batches": "data.pipeline",
    "build_method": "methods.choose",  # what a configuration learns: its loss and validation, as functions
    "train": "training.loop",
    "load": "formats.load",  # a checkpoint of any kind: the model and its tokenizer
    "Gemma2": "model.transformer",  # logits, hidden states
    "layer_states": "model.lens",  # hidden states after any layer
    "attention_maps": "model.lens",
    "logit_lens": "model.lens",
    "count_parameters": "model.counts",
    "evaluate_run": "evaluation.evaluate",
    "Sampler": "sampling.sampler",
    "SamplingConfig": "sampling.config",
    "convert": "formats.convert",
    "plan": "planning.plan",  # memory, communication and least time of a step on machines that need not be there
    "UserError": "config",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gemma2_jax' has no attribute {name!r}; it has {', '.join(_PLACES)}")
    value = getattr(import_module(f"gemma2_jax.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
