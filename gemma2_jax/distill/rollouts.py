"""On-policy distillation (GKD, Agarwal et al., arXiv 2306.13649, Algorithm 1): batches of the student's own samples.

Each step is on-policy with probability lambda: the student samples a completion of the first tokens of each row of the
data and is trained on it. The other steps train on the data. Teacher, divergence and step are the same for both. No
gradient flows through the sampling.

Most rows start with the rest of a document that the previous row cut off. So most prompts are from the middle of a
document, without its beginning-of-text token.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import gathered
from gemma2_jax.model.stack import as_one
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, Weight, map_specs, weight_specs
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.decoding import advance, begin, row_keys
from gemma2_jax.schedule import ScheduleConfig, build_schedule, values_of
from gemma2_jax.sharding.layout import constrain


@dataclass(frozen=True)
class OnPolicyConfig:
    """How often the student is trained on its own samples, and how they are sampled.

    Attributes:
        fraction: lambda, the probability that a step is on-policy, from 0 to 1; a number or a schedule.
        prompt_tokens: maximum length of a prompt, which is taken from the start of a row and from one document only.
            Most rows start inside a document, since packing cuts documents at row boundaries.
        temperature: divides the logits before a token is drawn; 1 draws from the student's own distribution.
    """

    fraction: float | ScheduleConfig
    prompt_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for value in values_of(self.fraction):
            if not 0 <= value <= 1:
                raise UserError(f"distill.on_policy.fraction is {value}; it must be from 0 to 1.")
        if self.prompt_tokens < 1:
            raise UserError(
                f"distill.on_policy.prompt_tokens is {self.prompt_tokens}; it must be at least 1."
            )
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"distill.on_policy.temperature is {self.temperature}; it must be a number above 0."
            )


def on_policy_steps(config: OnPolicyConfig, seed: int, steps: int) -> np.ndarray:
    """Draws independently for each step of a run of `steps` whether it is on-policy: bool [steps].

    The result depends only on the arguments, so that a resumed run and all processes agree. It is known before the
    first step, so that no step has to wait for the devices.
    """
    fraction = config.fraction
    if isinstance(fraction, ScheduleConfig):
        fraction = build_schedule(fraction, steps)(jnp.arange(steps))
    # Python's generator gives the same numbers in every version.
    draw = random.Random(f"on-policy steps of seed {seed}")
    return np.array([draw.random() for _ in range(steps)]) < np.asarray(fraction)


def rollout(
    config: OnPolicyConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    params: Params,
    batch: Batch,
    seed: int,
    step: jax.Array,
    end_of_text: int,
) -> Batch:
    """Samples the student's completions of prompts from a batch, and returns them as a batch.

    A row's prompt is the start of its first segment, which is a document or the rest of one; no row may be empty. The
    completion ends with `end_of_text`, or when prompt and completion have T + 1 tokens, the last of which is only a
    target, as in a row of data. The samples depend on `seed`, `step` and the row's index in the whole batch, not on the
    mesh.

    While sampling, every device holds the student's weights in compute's dtype, sharded over the tensor axis only:
    gathering them over the fsdp axis for each token would take far longer than the matrix products.

    Args:
        model, compute, params: configuration, compute settings and parameters of the student.
        batch: batch of data, which the prompts are taken from.
        end_of_text: id of the token that ends a completion.
    """
    T = batch.tokens.shape[1]
    compute, choice = replace(compute, remat="none"), TokenChoice(config.temperature)
    stops = jnp.array([end_of_text], jnp.int32)
    decoder = Decoder(Gemma2(model, _gathered(model, params, compute)), compute)
    prompts = batch.tokens[:, : config.prompt_tokens]
    lengths = jnp.sum(batch.segment_ids[:, : config.prompt_tokens] == 1, axis=1)
    keys = row_keys(jax.random.fold_in(jax.random.key(seed), step), len(prompts))
    # Rows with long prompts are full before the others; what they sample after that is dropped, so the KV cache does
    # not need room for it.
    progress = begin(decoder, prompts, lengths, keys, stops, T, choice)
    left = T - jnp.min(lengths)
    _, sampled = advance(decoder, progress, keys, stops, left, T - 1, choice)
    new = jnp.concatenate([progress.tokens[:, None], sampled], axis=1)
    return lay_out(prompts, lengths, new, end_of_text)


def lay_out(prompts: jax.Array, lengths: jax.Array, new: jax.Array, stop: int) -> Batch:
    """Combines prompts and completions into rows of one document each, in which only new tokens count in the loss.

    Args:
        prompts: int32 [B, S], right-padded.
        lengths: int32 [B], lengths of the prompts, from 1 to S.
        new: int32 [B, T], tokens after each prompt. Tokens after the first `stop`, or beyond a total of T + 1 tokens
            with the prompt, are dropped.
        stop: id of the token that ends a completion.

    Returns:
        Rows of T tokens, with zeros after their end. The loss mask selects the new targets, including `stop`.
    """
    T = new.shape[1]
    index = jnp.arange(T + 1)
    start = lengths[:, None]
    prompts = jnp.pad(prompts, ((0, 0), (0, T + 1 - prompts.shape[1])))
    after = jnp.take_along_axis(new, jnp.clip(index - start, 0, T - 1), axis=1)
    document = jnp.where(index < start, prompts, after)
    is_stop = new == stop
    count = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1) + 1, T)
    end = jnp.minimum(lengths + count, T + 1)[:, None]

    place = index[:-1]
    used = place < end - 1
    return Batch(
        tokens=jnp.where(used, document[:, :-1], 0),
        targets=jnp.where(used, document[:, 1:], 0),
        positions=jnp.where(used, place, 0),
        segment_ids=used.astype(jnp.int32),
        loss_mask=(used & (place >= start - 1)).astype(jnp.float32),
    )


def _gathered(model: ModelConfig, params: Params, compute: ComputeConfig) -> Params:
    """Weights in the dtypes that `Decoder` uses, gathered for use; cast before gathering, so that less is sent."""

    def gather(_: str, weight: Weight, value: Any) -> Any:
        stack = as_one(value)
        return gathered(stack, weight.dims, compute.dtype) if weight.fan_in else constrain(stack, weight.dims)

    found: Params = map_specs(gather, weight_specs(model), params)
    return found
