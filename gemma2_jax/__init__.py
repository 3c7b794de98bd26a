"""Gemma 2 in JAX: training, distillation and analysis.

The same letters stand for the same dimensions in every einsum, comment and shape, and in the keys of `layout`:

    B  batch          T  query position          S  key position       D  model width
    N  query heads    K  key/value heads         G  query heads per key/value head (N = K * G)
    H  head width     F  feed-forward width      V  vocabulary
    L  layers         P  (local, global) pairs of layers                R  rank of an adapter
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

from gemma2_jax.virtual_devices import enlarge_thread_pool

enlarge_thread_pool()  # here, because JAX must not have used its devices before

# The public API. Each name is imported when it is first used, so that `import gemma2_jax` stays fast.
_MODULES = {
    "compose": "cli.compose",  # from key=value overrides to the configuration of a run
    "prepare": "data.prepare",  # a run's data and tokenizer
    "train_batches": "data.pipeline",
    "build_method": "methods.choose",  # a configuration's training method: its loss and validation as functions
    "train": "training.loop",
    "read_metrics": "training.metrics",  # the rows of a run's metrics.jsonl
    "load": "formats.load",  # a model and its tokenizer from a checkpoint of any format
    "Gemma2": "model.transformer",  # logits, hidden states
    "Collector": "model.transformer",  # keeps any activations of a forward pass
    "layer_states": "model.lens",  # hidden states after any layer
    "attention_maps": "model.lens",
    "logit_lens": "model.lens",
    "count_parameters": "model.counts",
    "evaluate": "evaluation.evaluate",  # any checkpoints on any text
    "EvaluationConfig": "evaluation.config",
    "evaluate_run": "evaluation.evaluate_run",
    "Sampler": "sampling.sampler",
    "SamplingConfig": "sampling.config",
    "convert": "formats.convert",
    "LiteRTSettings": "formats.litert",
    "merge": "formats.merge",  # several models into one
    "compose_sweep": "cli.compose_sweep",  # a sweep from key=value,value overrides, or from sweep.yaml
    "run_sweep": "studies.sweep",
    "collect_runs": "studies.scaling.runs",  # the points of a scaling law from run folders
    "fit_runs": "studies.scaling.fitted",  # a scaling law
    "write_page": "reports.write",  # an HTML page about runs
    "plan": "planning.plan",  # memory, communication and minimum time of a step, also for absent hardware
    "estimate": "planning.search",  # memory and time by formula, for every mesh; compiles nothing
    "CHIPS": "chips",  # peaks, memory and bandwidths of accelerators
    "UserError": "config",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gemma2_jax' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    value = getattr(import_module(f"gemma2_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
