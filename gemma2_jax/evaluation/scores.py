"""Scores of a model's predictions over batches, alone and compared with a teacher.

The logits of one block of tokens exist at a time (`lm_head_sums`), so there is no array over all tokens and the
vocabulary.

Notation: P is the model's distribution of the next token, Q the teacher's, y the text's own next token, top the model's
most likely token. All means are over the scored tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.kernels.lm_head import Logits, lm_head_sums
from gemma2_jax.methods.distillation import TEACHER
from gemma2_jax.methods.language_modelling import MODEL, head_and_layers
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives import terms
from gemma2_jax.objectives.objective import evaluation_loss
from gemma2_jax.training.metrics import perplexity
from gemma2_jax.training.validation import sum_over

BINS = 15  # of the calibration error, equally wide (Guo et al., arXiv 1706.04599, section 5)

Sums = Mapping[str, Any]  # metrics summed over scored tokens
# (models by name: MODEL and perhaps TEACHER, batch, byte lengths of the token ids [V]) -> sums.
Scoring = Callable[[Mapping[str, Gemma2], Batch, np.ndarray], Sums]


@dataclass(frozen=True)
class CalibrationBin:
    """The tokens for which the probability of `top` is within one of `BINS` equal parts of [0, 1].

    Attributes:
        tokens: number of tokens.
        confidence: mean P(top); None without tokens.
        accuracy: fraction of tokens where top is y; None without tokens.
    """

    tokens: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Scores:
    """The scores of a model on some text. Comparisons with a teacher are None without one; so are infinite numbers.

    Attributes:
        tokens: number of scored tokens.
        bytes: number of bytes of text in UTF-8 that they stand for; end-of-text and turn tokens count as 0.
        nats: sum of -log P(y).
        cross_entropy: mean of -log P(y) in nats.
        perplexity: exp(cross_entropy).
        bits_per_byte: nats / (ln 2 * bytes), comparable between tokenizers.
        entropy: mean of -sum P log P in nats.
        accuracy: fraction of tokens where top is y.
        calibration_error: expected calibration error, the mean over tokens of |accuracy - confidence| of their bin
            (arXiv 1706.04599, equation 3).
        kl: mean KL(Q || P) in nats.
        agreement: fraction of tokens where P and Q have the same most likely token.
        acceptance: mean of sum min(P, Q) = 1 - total variation, the rate at which speculative decoding with the model
            as draft and the teacher as target accepts a token (arXiv 2211.17192).
        confidence_difference: mean |P(top) - Q(top)|, the calibration against the teacher.
        teacher_entropy: mean of -sum Q log Q in nats.
        bins: the bins of calibration_error, in order.
    """

    tokens: int
    bytes: int
    nats: float | None
    cross_entropy: float | None
    perplexity: float | None
    bits_per_byte: float | None
    entropy: float | None
    accuracy: float | None
    calibration_error: float | None
    kl: float | None
    agreement: float | None
    acceptance: float | None
    confidence_difference: float | None
    teacher_entropy: float | None
    bins: tuple[CalibrationBin, ...]


def build_scoring(compute: ComputeConfig, block_tokens: int) -> Scoring:
    """Returns the compiled program that sums the scores of a batch's targets.

    Its sums are those of `evaluation_loss` and `targets`, as in validations during training, and those that `Scores`
    needs in addition.

    Args:
        block_tokens: number of tokens per device whose logits exist at a time.
    """
    compute = replace(compute, remat="none")

    @jax.jit
    def sums(models: Mapping[str, Gemma2], batch: Batch, byte_lengths: jax.Array) -> dict[str, Any]:
        heads = {name: head_and_layers(model, batch, compute, None)[0] for name, model in models.items()}
        _, metrics = lm_head_sums(
            _token_scores, heads, {"targets": batch.targets}, batch.loss_mask, block_tokens
        )
        # Summed as one array: fetching a number from the devices takes longer than adding it.
        metrics["bins"] = jnp.stack([jnp.stack(each) for each in metrics["bins"]])
        lengths = byte_lengths.astype(jnp.float32)[batch.targets]
        return {
            **metrics,
            "targets": jnp.sum(batch.loss_mask),
            "bytes": jnp.sum(lengths * batch.loss_mask),
        }

    return sums


def score(
    scoring: Scoring,
    models: Mapping[str, Gemma2],
    batches: Iterable[Batch],
    byte_lengths: Sequence[int],
    mesh: Mesh,
) -> dict[str, Any]:
    """Returns the sums of a model's scores over batches of NumPy arrays, as floats.

    Args:
        byte_lengths: `Tokenizer.byte_lengths`.
    """
    lengths = np.zeros(models[MODEL].config.vocab_size, np.int32)
    lengths[: len(byte_lengths)] = byte_lengths
    found: dict[str, Any] = sum_over(lambda batch: scoring(models, batch, lengths), batches, mesh)
    return found


def add_sums(each: Sequence[Sums]) -> dict[str, Any]:
    """Adds the sums of several parts of a text."""
    added = {name: sum(np.asarray(sums[name], np.float64) for sums in each) for name in each[0]}
    return {name: np.asarray(total).tolist() for name, total in added.items()}


def scores_of(sums: Sums) -> Scores:
    """Returns the scores from the sums that `score` or `add_sums` returns."""
    tokens, nats, size = sums["targets"], sums["cross_entropy"], sums["bytes"]
    bins = np.asarray(sums["bins"])

    def mean(name: str) -> float | None:
        return _finite(sums[name] / tokens) if name in sums else None

    return Scores(
        tokens=round(tokens),
        bytes=round(size),
        nats=_finite(nats),
        cross_entropy=mean("cross_entropy"),
        perplexity=_finite(perplexity(nats / tokens)),
        bits_per_byte=_finite(nats / (math.log(2) * size)) if size else None,
        entropy=mean("entropy"),
        accuracy=mean("accuracy"),
        calibration_error=_finite(float(np.abs(bins[1] - bins[2]).sum()) / tokens),
        kl=mean("kl"),
        agreement=mean("agreement"),
        acceptance=mean("acceptance"),
        confidence_difference=mean("confidence_difference"),
        teacher_entropy=mean("teacher_entropy"),
        bins=tuple(_bin(*column) for column in bins.T.tolist()),
    )


def _bin(tokens: float, confidence: float, accuracy: float) -> CalibrationBin:
    if not tokens:
        return CalibrationBin(0, None, None)
    return CalibrationBin(round(tokens), _finite(confidence / tokens), _finite(accuracy / tokens))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _token_scores(
    logits: Logits, per_token: Mapping[str, Any], coefficients: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """The scores of each token, see `lm_head_sums`; `bins` has three rows of `BINS` sums: tokens, confidence, hits."""
    loss, metrics = evaluation_loss(logits, per_token, coefficients)
    model = logits[MODEL]
    top = jnp.argmax(model, axis=-1)
    confidence = jnp.exp(jnp.max(model, axis=-1) - jax.nn.logsumexp(model, axis=-1))
    hit = (top == per_token["targets"]).astype(jnp.float32)
    index = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
    inside = [(index == number).astype(jnp.float32) for number in range(BINS)]
    found: dict[str, Any] = {**metrics, "accuracy": hit}
    found["bins"] = tuple([weight * each for each in inside] for weight in (1.0, confidence, hit))
    if TEACHER in logits:
        teacher = logits[TEACHER]
        probability = jnp.exp(-terms.cross_entropy(teacher, top))
        found["confidence_difference"] = jnp.abs(confidence - probability)
    return loss, found
