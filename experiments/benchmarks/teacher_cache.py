"""Measures a teacher cache: bytes per token of each encoding, time to encode, and speed of reading.

    python experiments/benchmarks/teacher_cache.py

There are two teachers. The synthetic teacher has a vocabulary of 256,000 and power-law distributions: the token of
rank r has a probability proportional to r^-a, with `a` drawn between 1.1 and --steepest for each position. The ranking
of the ids is random too, with frequent (low) ids first more often. Its perplexity is 9 at --steepest 3.0, and 14 at
2.5. The trained teacher is model=small_1m, trained by this script for --steps steps on the built-in corpus or --source.

Bytes are the sizes of records, including headers and checksums; times are medians over repetitions. Encoding goes from
logits on the device to bytes; the row `softmax` is the time of a softmax alone over the same logits. The next table
gives the tokens per second of batches with the teacher's entries (sampled, N = 50) and without. The last one gives the
same for training on both, compared with training on one batch in memory: a ratio of 1 means that no step waits for its
batch.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from shared import median_seconds

from gemma2_jax.cli.compose import compose
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.sources import PYTHON_DOCS
from gemma2_jax.distill.cache.encoding import EncodingConfig, encode
from gemma2_jax.distill.cache.manifest import CacheManifest
from gemma2_jax.distill.cache.reader import cached_batches
from gemma2_jax.distill.cache.records import Packed, Packer, log_grid
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.distillation import TARGETS
from gemma2_jax.methods.method import BASE
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.state import Update, initial_state
from gemma2_jax.training.step import build_train_step
from gemma2_jax.training.teacher_cache import write_cache

BLOCK = 128  # tokens whose logits are in memory at a time
SHAPES = [(16, 128), (32, 1024)]  # (B, T) of the batches
ENCODINGS = {
    "sampled, N = 12": EncodingConfig(entries=12),
    "sampled, N = 50": EncodingConfig(entries=50),
    "sampled, N = 256": EncodingConfig(entries=256),
    "sampled, N = 50, proposal temperature 1.25": EncodingConfig(entries=50, proposal_temperature=1.25),
    "top-k, k = 50": EncodingConfig("top_k", 50),
    "top-p, p = 0.9, k = 50": EncodingConfig("top_p", 50, p=0.9),
}
FULL = {"full": EncodingConfig("full", None)}


def synthetic_logits(vocab_size: int, tokens: int, steepest: float) -> tuple[np.ndarray, float]:
    """Returns log-probabilities [tokens, V] of power laws, and their mean entropy in nats."""
    random = np.random.default_rng(0)
    log_ranks = np.log(np.arange(1, vocab_size + 1))
    frequency = -np.log(np.arange(vocab_size) + 10.0)
    logits = np.empty((tokens, vocab_size), np.float32)
    entropies = []
    for token in logits:
        log_p = -random.uniform(1.1, steepest) * log_ranks
        log_p -= np.log(np.exp(log_p).sum())
        entropies.append(-np.sum(np.exp(log_p) * log_p))
        token[np.argsort(-(frequency + random.gumbel(size=vocab_size)))] = log_p
    return logits, float(np.mean(entropies))


def synthetic(vocab_size: int, tokens: int, steepest: float, repetitions: int) -> None:
    logits, entropy = synthetic_logits(vocab_size, tokens, steepest)
    model = ModelConfig(vocab_size, 2, 8, 1, 1, 8, 8, None, 8.0)
    print(
        f"\nsynthetic teacher: V = {vocab_size:,}, {tokens:,} tokens, mean entropy {entropy:.2f} nats "
        f"(perplexity {math.exp(entropy):.1f})"
    )
    print(f"{'':44}{'bytes/token':>12}{'ids/token':>12}{'encode, µs':>12}{'pack, µs':>12}")
    block = jnp.asarray(logits[:BLOCK])
    softmax = jax.jit(jax.nn.softmax)
    seconds = median_seconds(lambda: softmax(block).block_until_ready(), repetitions)
    for label, config in ENCODINGS.items():
        blocks = [
            jax.tree.map(np.asarray, encode_block(config, logits[start : start + BLOCK], start))
            for start in range(0, tokens, BLOCK)
        ]
        entries = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        packer = Packer(config, log_grid(config, model), vocab_size, tokens)
        packed = packer.pack(entries, 0)
        encoding = median_seconds(partial(_encode_and_wait, config, block), repetitions)
        packing = median_seconds(partial(packer.pack, entries, 0), repetitions)
        row(label, packed, packer, tokens, encoding / len(block), packing / tokens)
    print(f"{'softmax':44}{'':24}{1e6 * seconds / len(block):>12.1f}")


@partial(jax.jit, static_argnums=0)
def encode_block(config: EncodingConfig, logits: jax.Array, start: int) -> Any:
    positions = start + jnp.arange(len(logits))
    return encode(config, logits, logits.shape[-1], jnp.uint32(0), positions)


def _encode_and_wait(config: EncodingConfig, logits: jax.Array) -> None:
    jax.block_until_ready(encode_block(config, logits, 0))


def row(label: str, packed: Packed, packer: Packer, tokens: int, encoding: float, packing: float) -> None:
    sparse, _ = packer.unpack([packed.record], packed.largest)
    ids = float(np.mean(np.sum(sparse.log_weights > -1e29, axis=-1)))
    print(
        f"{label:44}{len(packed.record) / tokens:>12.1f}{ids:>12.1f}{1e6 * encoding:>12.1f}{1e6 * packing:>12.1f}"
    )


def trained_teacher(folder: Path, source: str, vocab_size: int, steps: int) -> RunConfig:
    """Trains a small model and returns its configuration."""
    config = compose(
        [
            "model=small_1m",
            f"training.steps={steps}",
            f"training.eval_every={steps}",
            f"training.log_every={steps}",
            f"checkpoint.every={steps}",
            f"optimizer.warmup_steps={steps // 10}",
        ],
        values={
            "output": str(folder / "teacher"),
            "data.source": source,
            "data.folder": str(folder / "data"),
            "tokenizer.path": str(folder / "tokenizer.model"),
            "tokenizer.vocab_size": vocab_size,
            "metrics.tensorboard": False,
        },
    )
    prepare(config.data, config.tokenizer)
    train(config)
    return config


def cache(
    config: RunConfig, encoding: EncodingConfig, folder: Path, steps: int
) -> tuple[CacheManifest, RunConfig]:
    """Writes a cache with the run as teacher; returns its manifest, and the configuration of a student that uses it."""
    student = replace(
        config,
        training=replace(config.training, steps=steps),
        objective=replace(config.objective, cross_entropy=0.0, forward_kl=1.0),
        distill=DistillConfig(config.output, "float32", cache=str(folder), encoding=encoding),
    )
    return write_cache(student), student


def records(manifest: CacheManifest, folder: Path) -> Iterator[bytes]:
    source = grain.sources.ArrayRecordDataSource([f"{folder}/{file.file}" for file in manifest.files])
    return (source[number] for number in range(len(source)))


def trained(config: RunConfig, folder: Path, steps: int) -> None:
    evaluated = [line for line in read_metrics(config.output) if line["split"] == "validation"][-1]
    print(
        f"\ntrained teacher: V = {config.model.num_tokens:,}, validation perplexity {evaluated['perplexity']:.1f}, "
        f"{steps * config.data.batch_size * config.data.seq_len:,} tokens of rows of {config.data.seq_len}"
    )
    print(f"{'':44}{'bytes/token':>12}{'ids/token':>12}{'all, µs':>12}")
    for number, (label, encoding) in enumerate({**ENCODINGS, **FULL}.items()):
        start = time.perf_counter()
        made = folder / f"cache-{number}"
        manifest, _ = cache(config, encoding, made, 1 if encoding.kind == "full" else steps)
        seconds = time.perf_counter() - start
        tokens = manifest.rows * config.data.seq_len
        size = sum(len(record) for record in records(manifest, made))
        ids = np.mean(
            [
                (batch.extra[TARGETS].log_weights > -1e29).sum(-1).mean()
                for batch in cached_batches(config.data, str(made))
            ]
        )
        print(f"{label:44}{size / tokens:>12.1f}{ids:>12.1f}{1e6 * seconds / tokens:>12.1f}")


def feeding(config: RunConfig, folder: Path, tokens: int, repetitions: int) -> None:
    """Prints the speed of batches without training, from text and from a cache, measured alternately."""
    print(f"\n{'tokens/s':44}{'text':>12}{'cached':>12}{'ratio':>12}")
    for batch_size, seq_len in SHAPES:
        shaped = replace(config, data=replace(config.data, batch_size=batch_size, seq_len=seq_len))
        steps = max(2, tokens // (batch_size * seq_len))
        made = folder / f"fed-{seq_len}"
        cache(shaped, ENCODINGS["sampled, N = 50"], made, steps)

        def rate(batches: Iterator[Any], tokens: int = (steps - 1) * batch_size * seq_len) -> float:
            next(batches)
            start = time.perf_counter()
            for _ in batches:
                pass
            return tokens / (time.perf_counter() - start)

        rates = []
        for _ in range(repetitions):
            text = rate(itertools.islice(train_batches(shaped.data), steps))
            rates.append((text, rate(cached_batches(shaped.data, str(made)))))
        line(f"batches, B x T: {batch_size} x {seq_len}", rates)


def training(config: RunConfig, folder: Path, steps: int, repetitions: int) -> None:
    """Prints the speed of training on one batch in memory and on new batches, which shows the cost of waiting."""
    made = folder / "trained"
    _, student = cache(config, ENCODINGS["sampled, N = 50"], made, steps)
    distilled = replace(student, distill=replace(student.distill, teacher=None))
    sources: dict[str, tuple[RunConfig, Callable[[], Iterator[Any]]]] = {
        "training, text": (config, lambda: train_batches(config.data)),
        "training, cached": (distilled, lambda: cached_batches(config.data, str(made))),
    }
    print(f"\n{'tokens/s':44}{'in memory':>12}{'fed':>12}{'ratio':>12}")
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh):
        for label, (student, source) in sources.items():
            rate = training_rate(student, mesh, steps)
            rates = []
            for _ in range(repetitions):
                memory = rate(itertools.repeat(next(source())))
                rates.append((memory, rate(source())))
            line(label, rates)


def training_rate(config: RunConfig, mesh: Mesh, steps: int) -> Callable[[Iterator[Any]], float]:
    """Returns a function that takes `steps` training steps and returns their tokens per second, without the first."""
    method = build_method(config)
    update = Update(config, method.specs)
    step = build_train_step(method, update, update.abstract_state(mesh), config.layout)

    def rate(batches: Iterator[Any]) -> float:
        state, base = initial_state(config, method, mesh)
        start = 0.0
        for number in range(steps):
            state, _ = step(state, {BASE: base}, on_mesh(next(batches), mesh))
            if number == 0:  # may compile
                jax.block_until_ready(state)
                start = time.perf_counter()
        jax.block_until_ready(state)
        tokens = (steps - 1) * config.data.batch_size * config.data.seq_len
        return tokens / (time.perf_counter() - start)

    return rate


def line(label: str, rates: list[tuple[float, float]]) -> None:
    """Prints the medians of the pairs, and of their ratios."""
    one, other = (statistics.median(side) for side in zip(*rates, strict=True))
    ratio = statistics.median(after / before for before, after in rates)
    print(f"{label:44}{one:>12,.0f}{other:>12,.0f}{ratio:>12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=256_000, help="of the synthetic teacher (256000)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=1024,
        help="positions with a distribution of the synthetic teacher (1024)",
    )
    parser.add_argument(
        "--steepest", type=float, default=3.0, help="largest exponent of its power laws (3.0)"
    )
    parser.add_argument(
        "--source", default=PYTHON_DOCS, help="corpus of the trained teacher: a glob of files, as data.source"
    )
    parser.add_argument("--trained-vocab-size", type=int, default=4096, help="of the trained teacher (4096)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the trained teacher (200)")
    parser.add_argument(
        "--cached-steps", type=int, default=10, help="steps of data in each of its caches (10)"
    )
    parser.add_argument(
        "--fed-tokens", type=int, default=300_000, help="tokens in the caches for the feeding table (300000)"
    )
    parser.add_argument("--trained-steps", type=int, default=30, help="timed training steps (30)")
    arguments = parser.parse_args()
    synthetic(arguments.vocab_size, arguments.tokens, arguments.steepest, arguments.repetitions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = trained_teacher(folder, arguments.source, arguments.trained_vocab_size, arguments.steps)
        trained(config, folder, arguments.cached_steps)
        feeding(config, folder, arguments.fed_tokens, arguments.repetitions)
        training(config, folder, arguments.trained_steps, arguments.repetitions)


if __name__ == "__main__":
    main()
