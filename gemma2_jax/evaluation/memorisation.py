"""The memorisation test of the Gemma reports: does a model continue a document as it was written?

The model gets bos and the first 50 tokens of a document, and chooses its most likely token 50 times. A document counts
as memorised exactly if these are its next 50 tokens, and approximately if their edit distance (insertions, deletions
and substitutions of tokens) is at most 10 % of 50 (Gemma 2 report, arXiv 2408.00118, section 7).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma2_jax.sampling.config import SamplingConfig

PROMPT, CONTINUATION = 50, 50  # tokens
CLOSE = 5  # largest edit distance that counts as approximately memorised

# (prompts, settings) -> the new tokens of each prompt, as `Sampler.generate_tokens`.
Generate = Callable[[Sequence[Sequence[int]], SamplingConfig], list[list[int]]]


@dataclass(frozen=True)
class Memorisation:
    """How many of the tested documents a model has memorised.

    Attributes:
        documents: number of tested documents, each of at least 100 tokens.
        exact: number of those whose continuation is that of the document.
        approximate: number of those whose continuation has an edit distance of at most 5 tokens, exact ones included.
        exact_rate, approximate_rate: as fractions of the tested documents; None without any.
    """

    documents: int
    exact: int
    approximate: int
    exact_rate: float | None
    approximate_rate: float | None


def memorised(generate: Generate, bos: int, documents: Sequence[np.ndarray], batch: int) -> Memorisation:
    """Returns how many of the documents a model has memorised, tested `batch` at a time.

    Args:
        generate: generates the continuations.
        bos: the beginning-of-text id.
        documents: token ids without bos and eos, int [at least PROMPT + CONTINUATION].
    """
    greedy = SamplingConfig(max_new_tokens=CONTINUATION, temperature=0.0, stop_tokens=())
    distances: list[int] = []
    for first in range(0, len(documents), batch):
        texts = [document[: PROMPT + CONTINUATION] for document in documents[first : first + batch]]
        prompts = [[bos, *map(int, text[:PROMPT])] for text in texts]
        # Always a whole batch, so that one compiled program serves all.
        new = generate(prompts + prompts[:1] * (batch - len(prompts)), greedy)[: len(prompts)]
        distances += edit_distances(np.array(new), np.array([text[PROMPT:] for text in texts])).tolist()
    return result_of(len(distances), distances.count(0), sum(distance <= CLOSE for distance in distances))


def result_of(documents: int, exact: int, approximate: int) -> Memorisation:
    """Returns the result of a test with these counts."""
    rates = (exact / documents, approximate / documents) if documents else (None, None)
    return Memorisation(documents, exact, approximate, *rates)


def long_enough(documents: Iterator[np.ndarray], limit: int) -> list[np.ndarray]:
    """Returns the first `limit` documents that are long enough for the test, cut to the tokens that it uses."""
    found: list[np.ndarray] = []
    for document in documents:
        if len(document) >= PROMPT + CONTINUATION:
            found.append(document[: PROMPT + CONTINUATION])
            if len(found) == limit:
                break
    return found


def edit_distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Returns the Levenshtein distance of each pair of rows: int [B, n], int [B, m] to int [B]."""
    (B, n), m = ours.shape, theirs.shape[1]
    above = np.tile(np.arange(m + 1), (B, 1))
    for i in range(n):
        row = np.empty_like(above)
        row[:, 0] = i + 1
        substituted = above[:, :-1] + (ours[:, i : i + 1] != theirs)
        row[:, 1:] = np.minimum(above[:, 1:] + 1, substituted)
        # An insertion extends the entry to the left: min over j' <= j of row[j'] + j - j'.
        row = np.minimum.accumulate(row - np.arange(m + 1), axis=1) + np.arange(m + 1)
        above = row
    distances: np.ndarray = above[:, -1]
    return distances
