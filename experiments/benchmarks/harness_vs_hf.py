"""Times the evaluation harness on a CPU: our model class for it against its own `hf` backend.

    pip install -e '.[eval,reference]'
    python experiments/benchmarks/harness_vs_hf.py --threads 1

Both sides answer the same requests, with the same float32 weights of a small Gemma 2, in the same batch size: through
the harness's own methods, from texts to log-likelihoods, so tokenising is part of the time. The texts are the
documentation of Python's standard library.

    answers   questions of 40 to 400 words with 4 answers of 1 to 12 words each
    letters   the same questions with the answers A, B, C and D, of one token each
    texts     whole documents

Both sides run alternately in one process, on the same cores; the table shows medians over the rounds, of the elapsed
time and of the processor time of all threads. The latter is the one to look at where other programs run, too. A first,
untimed round of each side compiles ours; the time of this round is below the table. Before timing, the script checks
that both sides compute the same log-likelihoods.

transformers uses its eager attention: its "sdpa" drops Gemma 2's soft cap and thus computes a different model.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared import Seconds, alternate, use_cores

# Two float32 implementations: their sums over a text differ by rounding.
TOLERANCE = 1e-4
SIZES: dict[str, Any] = dict(
    num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1024, sliding_window=128,
    query_pre_attn_scalar=64,
)  # fmt: skip
CONTEXT = 2048

Side = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="cores and threads for each side (1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--questions", type=int, default=64, help="questions (64)")
    parser.add_argument("--texts", type=int, default=64, help="documents (64)")
    parser.add_argument("--batch", type=int, default=8, help="texts computed at a time (8)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the vocabulary (8192)")
    options = parser.parse_args()

    use_cores(options.threads)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        sys.exit("This benchmark needs lm_eval: pip install -e '.[eval,reference]'.")
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        documents = python_documents()
        write_checkpoints(Path(folder), documents, options.vocab_size)
        ours = our_side(Path(folder) / "run", options.batch)
        theirs = {bos: their_side(Path(folder) / "exported", options.batch, bos) for bos in (True, False)}
    answers, letters, texts = work(documents, options.questions, options.texts)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}; {options.threads} thread(s), "
        f"{options.rounds} rounds, batch {options.batch}"
    )
    sides: dict[str, tuple[Side, Side]] = {
        "answers": (
            lambda: ours.loglikelihood(answers),
            lambda: theirs[True].loglikelihood(answers, disable_tqdm=True),
        ),
        "letters": (
            lambda: ours.loglikelihood(letters),
            lambda: theirs[True].loglikelihood(letters, disable_tqdm=True),
        ),
        # With a bos in front of prompts, that backend begins a text with two.
        "texts": (
            lambda: ours.loglikelihood_rolling(texts),
            lambda: theirs[False].loglikelihood_rolling(texts, disable_tqdm=True),
        ),
    }
    firsts = {name: check_agreement(name, *pair) for name, pair in sides.items()}
    print(f"{'':24}{'gemma2_jax':>20}{'hf':>20}{'ratio':>8}{'CPU ratio':>11}  (of each round)")
    for (name, pair), requests in zip(sides.items(), (answers, letters, texts), strict=True):
        print_row(name, len(requests), alternate(pair, options.rounds))
    print("first run, with compilation: " + ", ".join(f"{name} {s:.1f} s" for name, s in firsts.items()))


def python_documents() -> list[str]:
    from gemma2_jax.data.python_docs import PythonDocs

    return [text for text, _ in PythonDocs() if 300 < len(text) < 6000]


def write_checkpoints(folder: Path, documents: Sequence[str], vocab_size: int) -> None:
    """Writes a model with random weights as a run folder and as a Hugging Face folder."""
    import jax

    from gemma2_jax.data.tokenizer import train_tokenizer
    from gemma2_jax.formats.convert import convert
    from gemma2_jax.formats.native import write_run
    from gemma2_jax.model.config import ModelConfig
    from gemma2_jax.model.transformer import Gemma2

    tokenizer = train_tokenizer(documents[:2000], folder / "tokenizer.model", vocab_size)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **SIZES)
    write_run(
        folder / "run", config, Gemma2.init(config, jax.random.key(0)).params(), folder / "tokenizer.model"
    )
    convert(folder / "run", folder / "exported")


def our_side(folder: Path, batch: int) -> Any:
    from gemma2_jax.evaluation.harness_model import HarnessModel
    from gemma2_jax.formats.load import load
    from gemma2_jax.model.config import ComputeConfig

    model, tokenizer = load(folder)
    return HarnessModel(model, tokenizer, ComputeConfig(unroll_layers=True), batch, CONTEXT)


def their_side(folder: Path, batch: int, bos: bool) -> Any:
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(
        pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch, max_length=CONTEXT, add_bos_token=bos
    )


def work(documents: Sequence[str], questions: int, texts: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The requests of the three tasks."""
    draw = random.Random(0)
    words = " ".join(draw.sample(list(documents), min(len(documents), 400))).split()

    def passage(least: int, most: int) -> str:
        length = draw.randint(least, most)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def requests(arguments: Sequence[tuple[str, ...]]) -> list[Any]:
        return [SimpleNamespace(args=each) for each in arguments]

    asked = [passage(40, 400) for _ in range(questions)]
    answers = [(question, f" {passage(1, 12)}") for question in asked for _ in range(4)]
    letters = [(question, f" {letter}") for question in asked for letter in "ABCD"]
    return requests(answers), requests(letters), requests([(text,) for text in draw.sample(documents, texts)])


def check_agreement(name: str, ours: Side, theirs: Side) -> float:
    """Exits unless both sides give the same log-likelihoods. Returns the seconds that ours took."""
    start = time.perf_counter()
    found = ours()
    seconds = time.perf_counter() - start
    for one, other in zip(found, theirs(), strict=True):
        log_prob, expected = (each[0] if isinstance(each, tuple) else each for each in (one, other))
        if abs(log_prob - expected) > TOLERANCE * max(1.0, abs(expected)):
            sys.exit(f"{name}: the two sides compute different log-likelihoods, {log_prob} and {expected}.")
    return seconds


def print_row(name: str, requests: int, seconds: list[list[Seconds]]) -> None:
    ours, theirs = (statistics.median(each.wall for each in side) for side in seconds)
    our_cpu, their_cpu = (statistics.median(each.cpu for each in side) for side in seconds)
    ratios = [their.cpu / our.cpu for our, their in zip(*seconds, strict=True)]
    speeds = "".join(f"{requests / median:>11.1f} ({median:5.2f} s)" for median in (ours, theirs))
    print(
        f"{name + ', requests/s':24}{speeds}"
        f"{theirs / ours:>8.2f}{their_cpu / our_cpu:>11.2f}  ({min(ratios):.2f} .. {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
