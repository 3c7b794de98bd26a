"""What the benchmarks share: cores, clocks, peak memory, and Hugging Face transformers as the other side.

JAX and torch are imported in the functions: XLA sizes its thread pool by the cores that the process may use when it
starts, so `use_cores` comes first.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gemma2_jax.machine import peak_memory_gib

Generate = Callable[
    [Sequence[int], int], list[int]
]  # the most likely tokens after a prompt, as many as asked for


class Seconds(NamedTuple):
    """Elapsed time, and the processor time of all threads."""

    wall: float
    cpu: float


def use_cores(threads: int) -> None:
    """Restricts this process to as many cores, and torch to as many threads; exits if there are too few cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        sys.exit(f"--threads is {threads}, but this process may use only {len(cores)} cores.")
    os.sched_setaffinity(0, set(cores[:threads]))
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        sys.exit(f"This benchmark compares with {error.name}: pip install -e '.[reference]'.")
    torch.set_num_threads(threads)


def alternate(sides: Sequence[Callable[[], Any]], rounds: int, repeats: int = 1) -> list[list[Seconds]]:
    """Returns the seconds per call of each side in each round."""
    seconds: list[list[Seconds]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, durations in zip(sides, seconds, strict=True):
            time.sleep(0.3)  # the other sides' threads spin for a while before they sleep
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                side()
            elapsed = time.perf_counter() - wall, time.process_time() - cpu
            durations.append(Seconds(*(each / repeats for each in elapsed)))
    return seconds


def median_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Returns the median seconds of a call, which waits for its results, after one untimed call."""
    call()
    durations = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def print_peak(call: Callable[[], Any]) -> None:
    """Prints the peak memory of this process in GB and the seconds of a call, for `print_peaks`."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    print(json.dumps({"peak": peak_memory_gib() * 2**30 / 1e9, "seconds": seconds}))


def print_peaks(command: Sequence[str], labels: Iterable[str]) -> None:
    """Prints a table of what `print_peak` prints in new processes: the command with each label as its last argument."""
    print(f"{'':12}{'peak GB':>12}{'seconds':>12}")
    for label in labels:
        completed = subprocess.run([*command, label], check=True, stdout=subprocess.PIPE)
        figures = json.loads(completed.stdout)
        print(f"{label:12}{figures['peak']:>12.2f}{figures['seconds']:>12.1f}", flush=True)


def random_batch(rows: int, length: int, tokens: int) -> Any:
    """Returns a `Batch` of `rows` documents of `length` random ids below `tokens`."""
    import jax
    import jax.numpy as jnp

    from gemma2_jax.data.batch import Batch

    ids = jax.random.randint(jax.random.key(0), (rows, length), 0, tokens)
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    return Batch(ids, jnp.roll(ids, -1, 1), positions, jnp.ones_like(ids), jnp.ones(ids.shape))


def our_generation(model: Any, compute: Any) -> Generate:
    """Returns the greedy decoding of a `Gemma2`, executed by a `ComputeConfig`."""
    from types import SimpleNamespace

    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler

    # It takes and returns ids here, so it needs only the vocabulary size of a tokenizer.
    ids_only: Any = SimpleNamespace(vocab_size=model.config.num_tokens)
    sampler = Sampler(model, ids_only, compute)

    def generate(prompt: Sequence[int], new_tokens: int) -> list[int]:
        greedy = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0, stop_tokens=())
        return sampler.generate_tokens([prompt], greedy)[0]

    return generate


def their_model(config: Any, dtype: str = "float32", device: str = "cpu") -> Any:
    """Returns transformers' Gemma 2 of a `ModelConfig`, with random weights.

    Its attention is "eager": "sdpa" drops the soft cap and thus computes a different model.
    """
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from gemma2_jax.formats.huggingface_config import config_json
    from gemma2_jax.model.vocabulary import without_padding

    values: dict[str, Any] = config_json(without_padding(config), dtype)
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_implementation": "eager"}
    with torch.device(device):
        return Gemma2ForCausalLM._from_config(Gemma2Config(**values), dtype=getattr(torch, dtype))


def their_generation(model: Any) -> Generate:
    """Returns the greedy decoding of a model of transformers."""
    import torch

    model.eval()

    def generate(prompt: Sequence[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        found: list[int] = out[0, len(prompt) :].tolist()
        return found

    return generate


class TheirTraining:
    """Training of a model of transformers with AdamW.

    Args:
        inputs, targets: int64 [B, T]. The targets are already shifted, so all positions count, as on our side.
    """

    def __init__(
        self, model: Any, inputs: Any, targets: Any, learning_rate: float, weight_decay: float
    ) -> None:
        import torch

        self.model, self._inputs, self._targets = model.train(), inputs, targets
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )

    def _loss(self) -> Any:
        return self.model(
            self._inputs, labels=self._targets, shift_labels=self._targets, use_cache=False
        ).loss

    def loss(self) -> float:
        import torch

        with torch.no_grad():
            return float(self._loss())

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self._optimizer.step()
