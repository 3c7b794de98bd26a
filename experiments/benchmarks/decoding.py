"""Times greedy decoding in gemma2_jax, Hugging Face transformers and llama.cpp, on a CPU.

    pip install -e '.[reference,gguf]' llama-cpp-python
    python experiments/benchmarks/decoding.py --threads 1
    python experiments/benchmarks/decoding.py --threads 2 --size 0.5B --new-tokens 16

All engines use the same weights and one prompt of 32 tokens: ours and transformers (eager attention, since its "sdpa"
drops the soft cap) in float32, llama.cpp in F32 and Q8_0 (its cache is F16, its default). They run alternately in one
process, on the same cores; the table shows medians over the rounds. Compilation and each engine's first generation are
not timed. On a busy machine, wall time depends on the other programs; the process's CPU time does so much less, but
with several threads it includes the time that idle threads spin. Without llama-cpp-python, its rows are left out.

Before timing, the script checks that ours and transformers generate the same tokens, and prints how many of llama.cpp's
are the same: it takes GELU from a table of 16-bit numbers, and random weights leave close decisions to rounding.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from shared import Seconds, alternate, our_generation, their_generation, their_model, use_cores

PROMPT = list(range(10, 42))
SIZES: dict[str, dict[str, Any]] = {
    "benchmark": dict(
        vocab_size=8192, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1024,
        sliding_window=128, query_pre_attn_scalar=64,
    ),
    "0.5B": dict(
        vocab_size=65536, num_layers=24, d_model=1024, num_heads=8, num_kv_heads=4, head_dim=128, d_ff=4608,
        sliding_window=4096, query_pre_attn_scalar=128,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """An engine with its copy of the weights; `decode` returns so many of the most likely tokens after PROMPT."""

    name: str
    decode: Callable[[int], list[int]]


class LlamaCpp:
    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def decode(self, new_tokens: int) -> list[int]:
        library, context = self._library, self._llama.ctx
        library.llama_memory_clear(library.llama_get_memory(context), True)
        found: list[int] = []
        tokens = PROMPT
        while True:
            array = (library.llama_token * len(tokens))(*tokens)
            if library.llama_decode(context, library.llama_batch_get_one(array, len(tokens))):
                sys.exit("llama.cpp could not run the tokens.")
            pointer = library.llama_get_logits_ith(context, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))
            tokens = [int(logits.argmax())]
            found += tokens
            if len(found) == new_tokens:
                return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="cores and threads of each engine (1)")
    parser.add_argument("--size", choices=SIZES, default="benchmark", help="sizes of the model (benchmark)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to generate (128)")
    options = parser.parse_args()

    use_cores(options.threads)
    import torch
    import transformers

    engines = build_engines(SIZES[options.size], options.threads)
    check_agreement(engines, options.new_tokens)
    print(
        f"{options.size}, {options.threads} thread(s), {options.rounds} rounds of {options.new_tokens} tokens; "
        f"transformers {transformers.__version__}, torch {torch.__version__}"
    )
    seconds = alternate([partial(engine.decode, options.new_tokens) for engine in engines], options.rounds)
    print_table(engines, options.new_tokens, seconds)


def build_engines(sizes: dict[str, Any], threads: int) -> list[Engine]:
    """Returns the engines that are installed, ours first and transformers second, with the same random weights."""
    import jax
    import torch

    from gemma2_jax.formats.layouts import GGUF, HUGGINGFACE
    from gemma2_jax.model.config import ComputeConfig, ModelConfig
    from gemma2_jax.model.transformer import Gemma2

    config = ModelConfig(**sizes)
    model = Gemma2.init(config, jax.random.key(0))
    theirs = their_model(config)
    state = {name: torch.from_numpy(array) for name, array in tensors_of(model, HUGGINGFACE).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    engines = [
        Engine("gemma2_jax", partial(our_generation(model, ComputeConfig(unroll_layers=True)), PROMPT)),
        Engine("transformers", partial(their_generation(theirs), PROMPT)),
    ]
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama.cpp is left out, since llama-cpp-python is not installed.")
        return engines
    from gemma2_jax.formats.gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = vocabulary_of(config.vocab_size, Path(folder) / "tokenizer.model")
        for encoding in ("f32", "q8_0"):
            file = Path(folder) / f"{encoding}.gguf"
            write_gguf(file, config, tensors_of(model, GGUF).items(), vocabulary, encoding, "benchmark")
            llama = LlamaCpp(file, threads)  # maps the file, which may then be deleted
            engines.append(Engine(f"llama.cpp {encoding.upper()}", llama.decode))
    return engines


def tensors_of(model: Any, layout: Any) -> dict[str, np.ndarray]:
    """Returns a model's weights by another tool's names, in its layout."""
    from gemma2_jax.formats.layouts import expand
    from gemma2_jax.model.weights import specs_by_path, weight_specs

    params: dict[str, np.ndarray] = {}
    for path in specs_by_path(weight_specs(model.config)):
        leaf: Any = model.params()
        for key in path.split("/"):
            leaf = leaf[key]
        params[path] = np.asarray(leaf)

    def part(place: Any) -> np.ndarray:
        whole = params[place.path]
        return whole if place.pair is None else whole[place.pair]

    entries = expand(layout, weight_specs(model.config))
    return {
        name: np.array(entry.join([part(place) for place in entry.places]))  # a copy that torch may write to
        for name, entry in entries.items()
    }


def vocabulary_of(tokens: int, path: Path) -> bytes:
    """Returns a SentencePiece model of this many tokens, as a GGUF file needs one; nothing is tokenised with it."""
    from gemma2_jax.data.tokenizer import train_tokenizer
    from gemma2_jax.formats.tokenizer_files import parse_model

    train_tokenizer(["the model learns the text of the books"] * 20, path, vocab_size=300)
    proto = parse_model(path.read_bytes(), "llama.cpp")
    for number in range(len(proto.pieces), tokens):
        proto.pieces.add(piece=f"piece{number}", score=-float(number), type=1)  # an ordinary piece
    return bytes(proto.SerializeToString())


def check_agreement(engines: list[Engine], new_tokens: int) -> None:
    """Exits unless the first two engines generate the same tokens; also runs each once."""
    ours, theirs, *others = (engine.decode(new_tokens) for engine in engines)
    if ours != theirs:
        sys.exit("gemma2_jax and transformers generate different tokens.")
    for engine, tokens in zip(engines[2:], others, strict=True):
        same = next(
            (n for n, pair in enumerate(zip(ours, tokens, strict=True)) if pair[0] != pair[1]), new_tokens
        )
        print(f"{engine.name}: the first {same} of {new_tokens} tokens are the same")


def print_table(engines: list[Engine], new_tokens: int, seconds: list[list[Seconds]]) -> None:
    """Prints medians, and each engine's time as a multiple of ours: the median over the rounds and its range."""
    print(f"{'':18}{'tokens/s':>10}{'CPU ms/token':>14}{'wall / ours':>24}{'CPU / ours':>24}")
    for engine, durations in zip(engines, seconds, strict=True):
        wall, cpu = (statistics.median(each) for each in zip(*durations, strict=True))
        ratios = [
            sorted(theirs[kind] / ours[kind] for ours, theirs in zip(seconds[0], durations, strict=True))
            for kind in (0, 1)
        ]
        shown = [f"{statistics.median(each):.2f} ({each[0]:.2f} .. {each[-1]:.2f})" for each in ratios]
        print(
            f"{engine.name:18}{new_tokens / wall:>10.1f}{1000 * cpu / new_tokens:>14.2f}{shown[0]:>24}{shown[1]:>24}"
        )


if __name__ == "__main__":
    main()
