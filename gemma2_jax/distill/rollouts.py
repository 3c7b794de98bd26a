"""On-policy distillation (GKD, Agarwal et al., arXiv 2306.13649, Algorithm 1): batches that the student wrote itself.

At each step, with probability lambda, the student continues the first tokens of the data's rows, and is trained on
what it wrote; else on the data. The teacher, the divergence and the step are the same for both. No gradient goes
through the sampling.

A row seldom begins with a document: mostly with the rest of one that the row before cut. So most prompts are from the
middle of a document, without the token of its beginning.
"""

import random
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import for_use
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, Weight, map_specs, weight_specs
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.decoding import advance, begin, row_keys
from gemma2_jax.schedule import ScheduleConfig, build_schedule, values_of
from gemma2_jax.sharding.layout import constrain


@dataclass(frozen=True)
class OnPolicyConfig:
    """How often the student is trained on its own samples, and how it samples.

    Attributes:
        fraction: lambda, the probability that a step is on-policy, from 0 to 1; a number or a schedule.
        prompt_tokens: the student continues at most the first so many tokens of each row, all of one document, of
            which they are seldom the beginning; see the top of this file.
        temperature: logits are divided by it before a token is drawn; 1 draws from the student's own distribution.
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
    """Which steps of a run of `steps` are on-policy, bool [steps]: each by a draw of its own.

    It depends on the arguments alone, so that a resumed run and all processes of one agree; and it is known before
    the first step, so that no step waits for the devices to tell.
    """
    fraction = config.fraction
    if isinstance(fraction, ScheduleConfig):
        fraction = build_schedule(fraction, steps)(jnp.arange(steps))
    # Python's, whose numbers are the same in every version.
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
    """The student's continuations of the rows of a batch.

    A row's prompt is the beginning of its first segment, a document's or that of the rest of one; each row must have
    one. It is continued up to `end_of_text`, or else to T + 1 tokens, of which the last is a target only, as in a row
    of data. What is drawn depends on `seed`, `step` and the row's place in the whole batch, not on the mesh.

    Every device holds the student's weights in compute's dtype while it samples, except for their split over the tensor
    axis: gathering them from the fsdp axis for each token would take far longer than its products.

    Args:
        model, compute, params: the student's; end_of_text: an id.
    """
    T = batch.tokens.shape[1]
    compute, choice = replace(compute, remat="none"), TokenChoice(config.temperature)
    stops = jnp.array([end_of_text], jnp.int32)
    decoder = Decoder(Gemma2(model, _gathered(model, params, compute)), compute)
    prompts = batch.tokens[:, : config.prompt_tokens]
    lengths = jnp.sum(batch.segment_ids[:, : config.prompt_tokens] == 1, axis=1)
    keys = row_keys(jax.random.fold_in(jax.random.key(seed), step), len(prompts))
    # Rows with long prompts are full before the others, and go on in vain: the cache need not hold that.
    progress = begin(decoder, prompts, lengths, keys, stops, T, choice)
    left = T - jnp.min(lengths)
    _, sampled = advance(decoder, progress, keys, stops, left, T - 1, choice)
    new = jnp.concatenate([progress.tokens[:, None], sampled], axis=1)
    return lay_out(prompts, lengths, new, end_of_text)


def lay_out(prompts: jax.Array, lengths: jax.Array, new: jax.Array, stop: int) -> Batch:
    """Prompts and what came after them as rows of one document each, in which only new tokens are targets.

    Args:
        prompts: int32 [B, S], right-padded; lengths: [B], from 1 to S.
        new: int32 [B, T], the tokens after each prompt. What exceeds T + 1 tokens with the prompt, or comes after the
            first `stop`, is dropped.

    Returns:
        Rows of T tokens, zeros after their end. The loss counts targets that are new, `stop` among them.
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
    """Weights as `Decoder` casts them, laid out for use: cast first, so that less is sent."""

    def gather(_: str, weight: Weight, value: jax.Array) -> jax.Array:
        return for_use(value, weight.dims, compute.dtype) if weight.fan_in else constrain(value, weight.dims)

    gathered: Params = map_specs(gather, weight_specs(model), params)
    return gathered
