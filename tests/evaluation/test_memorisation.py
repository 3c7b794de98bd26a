"""The memorisation test: edit distances against the textbook recursion, counts, and a model's own continuations."""

from collections.abc import Sequence

import numpy as np
import pytest

from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.memorisation import edit_distances, long_enough, memorised
from gemma2_jax.run import RunConfig
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from tests.model.models import vivid


def levenshtein(a: list[int], b: list[int]) -> int:
    table = [[max(i, j) if not (i and j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return table[-1][-1]


@pytest.mark.parametrize(("n", "m", "letters"), [(1, 1, 2), (6, 6, 2), (9, 5, 3), (5, 9, 3), (12, 12, 4)])
def test_edit_distances(n: int, m: int, letters: int) -> None:
    draw = np.random.default_rng(n)
    ours, theirs = draw.integers(0, letters, (40, n)), draw.integers(0, letters, (40, m))
    expected = [levenshtein(list(a), list(b)) for a, b in zip(ours, theirs, strict=True)]
    assert edit_distances(ours, theirs).tolist() == expected


def test_documents_count_as_exact_or_as_within_a_tenth() -> None:
    documents = [np.arange(number, number + 130) for number in (1000, 2000, 3000, 4000, 5000)]
    edited: dict[int, list[int]] = {}
    # The continuation itself, shifted by one token (distance 2), with 5 and with 6 other tokens, and nothing alike.
    for number, document in enumerate(documents):
        continuation = document[50:100].tolist()
        shifted = [*continuation[1:], -1]
        wrong = [-1] * (5 if number == 2 else 6) + continuation[5 if number == 2 else 6 :]
        edited[int(document[0])] = [continuation, shifted, wrong, wrong, [-1] * 50][number]
    sizes = []

    def generate(prompts: Sequence[Sequence[int]], settings: SamplingConfig) -> list[list[int]]:
        sizes.append(len(prompts))
        assert (settings.temperature, settings.max_new_tokens, settings.stop_tokens) == (0, 50, ())
        assert all(prompt[0] == 2 and len(prompt) == 51 for prompt in prompts)
        return [edited[prompt[1]] for prompt in prompts]

    found = memorised(generate, 2, documents, batch=2)
    assert sizes == [2, 2, 2]  # one size for the compiler
    assert (found.documents, found.exact, found.approximate) == (5, 1, 3)
    assert (found.exact_rate, found.approximate_rate) == (0.2, 0.6)


def test_short_documents_are_not_tested() -> None:
    documents = [np.arange(n) for n in (99, 100, 30, 150, 101)]
    assert [len(document) for document in long_enough(iter(documents), 2)] == [100, 100]
    found = memorised(lambda prompts, settings: [], 2, [], batch=4)
    assert (found.documents, found.exact_rate, found.approximate_rate) == (0, None, None)


@pytest.mark.thorough
def test_a_model_has_memorised_what_it_writes(toy_run: RunConfig, tokenizer: Tokenizer) -> None:
    sampler = Sampler(vivid(toy_run.model), tokenizer)
    draw = np.random.default_rng(0)
    starts = [[tokenizer.bos_id, *map(int, draw.integers(6, 300, 50))] for _ in range(3)]
    greedy = SamplingConfig(max_new_tokens=50, temperature=0.0, stop_tokens=())
    own = [
        np.array(start[1:] + new)
        for start, new in zip(starts, sampler.generate_tokens(starts, greedy), strict=True)
    ]
    other = draw.integers(6, 300, 100)
    found = memorised(sampler.generate_tokens, tokenizer.bos_id, [*own, other], batch=3)
    assert (found.documents, found.exact, found.approximate) == (4, 3, 3)
