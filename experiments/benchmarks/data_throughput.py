"""Measures the speed of tokenising text into shards and of reading batches from shards.

    python experiments/benchmarks/data_throughput.py

The built-in corpus, or --source, is repeated, with a number before each document, so that the time to start
processes matters little. The table gives medians over repetitions, in tokens per second. Tokenising means reading
JSONL, tokenising with an existing tokenizer, and writing shards; it is measured with one worker and with one per CPU.
Feeding means reading shards, shuffling, packing and batching; it is measured for a small and a large batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.sources import PYTHON_DOCS, open_documents
from gemma2_jax.machine import cores

SHAPES = [(16, 128), (32, 1024)]  # (B, T)


def tokenising(data: DataConfig, tokenizer: TokenizerConfig, repetitions: int) -> float:
    """Returns the tokens per second of `prepare`, which writes to a new folder in each repetition."""
    rates = []
    for repetition in range(repetitions):
        fresh = replace(data, folder=f"{data.folder}-{data.workers}-{repetition}")
        start = time.perf_counter()
        manifest = prepare(fresh, tokenizer)
        rates.append((manifest.train.tokens + manifest.validation.tokens) / (time.perf_counter() - start))
    return statistics.median(rates)


def feeding(data: DataConfig, tokens: int, repetitions: int) -> float:
    """Returns the tokens per second of `train_batches` over `tokens` tokens per repetition, after the first batch."""
    batches = train_batches(data)
    next(batches)
    count = max(1, tokens // (data.batch_size * data.seq_len))
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        rates.append(count * data.batch_size * data.seq_len / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--copies", type=int, default=8, help="number of times that the corpus is repeated")
    parser.add_argument("--source", default=PYTHON_DOCS, help="the corpus: a glob of files, as data.source")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="size of the tokenizer that is trained on the corpus"
    )
    parser.add_argument("--fed-tokens", type=int, default=2_000_000, help="tokens fed in one repetition")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = DataConfig(arguments.source, str(folder / "corpus"), 0.05, 128, 16, seed=0)
        tokenizer = TokenizerConfig(str(folder / "tokenizer.model"), vocab_size=arguments.vocab_size)
        prepare(data, tokenizer)
        with (folder / "repeated.jsonl").open("w") as file:
            for copy in range(arguments.copies):
                for text, _ in open_documents(data.sources, data.text_field):
                    file.write(json.dumps({"text": f"{copy} {text}"}) + "\n")
        repeated = replace(data, source=str(folder / "repeated.jsonl"), folder=str(folder / "repeated"))

        workers = cores()
        rows = [
            (
                f"tokenising, workers: {count}",
                tokenising(replace(repeated, workers=count), tokenizer, arguments.repetitions),
            )
            for count in sorted({1, workers})
        ]
        for batch_size, seq_len in SHAPES:
            shaped = replace(data, batch_size=batch_size, seq_len=seq_len)
            rate = feeding(shaped, arguments.fed_tokens, arguments.repetitions)
            rows.append((f"feeding, B x T: {batch_size} x {seq_len}", rate))
    print(f"{'':30}{'tokens/s':>12}")
    for label, rate in rows:
        print(f"{label:30}{rate:>12,.0f}")


if __name__ == "__main__":
    main()
