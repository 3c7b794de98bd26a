"""From prompts to text: batching, padding and streaming around the programs of `generation`."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.vocabulary import check_tokens
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.completion import Completion, Draw
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.generation import (
    MAX_STEPS,
    DraftStatistics,
    Generation,
    Plain,
    PromptBatch,
    Speculative,
)
from gemma2_jax.sampling.speculative import Models

_FIRST_STEPS = 8  # steps of the first dispatch, before their speed is known
_SECONDS = 0.1  # between two pieces of streamed text, unless one step takes longer

_make_decoder = jax.jit(Decoder, static_argnums=(1, 2))


class Sampler:
    """Completes prompts with a model's samples.

    The weights are copied into the layout of decoding (see `Decoder`), so the model itself can be deleted.

    Args:
        compute: its dtype is that of the weights and the cache; `unroll_layers` is twice as fast on CPU.
        draft: a smaller model with the same tokenizer, for speculative decoding: it proposes `draft_tokens` tokens at a
            time, which the model verifies in one pass. The distribution of the samples stays the model's own.
        quantize_cache: "int8" holds keys and values in eight bits, with a float32 scale per head and position, in the
            caches of model and draft; None holds them in compute's dtype.

    Attributes:
        draft_statistics: what has become of the draft's tokens so far.

    Raises:
        UserError: the tokenizer and a model have different numbers of tokens, `draft_tokens` is below 1, or
            `quantize_cache` is another text.
    """

    def __init__(
        self,
        model: Gemma2,
        tokenizer: Tokenizer,
        compute: ComputeConfig = ComputeConfig(),
        draft: Gemma2 | None = None,
        draft_tokens: int = 4,
        quantize_cache: str | None = None,
    ):
        check_tokens(model.config, tokenizer.vocab_size, "The tokenizer")
        if draft is not None:
            check_draft(model.config, draft.config, draft_tokens)
        if quantize_cache not in (None, "int8"):
            raise UserError(
                f"quantize_cache is {quantize_cache!r}; it must be 'int8', or None for compute's dtype."
            )

        def decoder(model: Gemma2) -> Decoder:
            made: Decoder = _make_decoder(model, compute, quantize_cache)
            return made

        self._decoder = decoder(model)
        self._draft = None if draft is None else decoder(draft)
        self._draft_tokens = draft_tokens
        self._tokenizer = tokenizer
        self.draft_statistics = DraftStatistics()

    def generate(self, prompts: Sequence[str], config: SamplingConfig) -> list[str]:
        """The completion of each prompt, without the prompt.

        Prompts may differ in length. Turn markers in them are encoded as control tokens, as
        `data.chat_format.render` writes them; the beginning-of-text token is prepended. Errors as in `complete`.
        """
        texts = [""] * len(prompts)
        for pieces in self.stream_batch(prompts, config):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """Yields the completion of one prompt piece by piece, in whole characters."""
        for (piece,) in self.stream_batch([prompt], config):
            if piece:
                yield piece

    def stream_batch(self, prompts: Sequence[str], config: SamplingConfig) -> Iterator[list[str]]:
        """Repeatedly yields the next piece of every row ("" if there is none)."""
        shown = [0] * len(prompts)
        for rows in self.complete(prompts, config):
            yield [row.text[start:] for row, start in zip(rows, shown, strict=True)]
            shown = [len(row.text) for row in rows]

    def complete(
        self, prompts: Sequence[str], config: SamplingConfig, draws: Sequence[Draw] | None = None
    ) -> Iterator[list[Completion]]:
        """Repeatedly yields the completions of all prompts, which grow between two yields.

        Args:
            draws: prompt and sample number of each row; by default, row i is the first sample of prompt i.

        Raises:
            UserError: `prompts` is a single text; or as `stream_tokens`.
        """
        if isinstance(prompts, str):  # its letters would be the prompts
            raise UserError(
                f"prompts is the text {prompts!r}; it must be a list of texts, as in [{prompts!r}]."
            )
        stop = self._stop_tokens(config)
        rows = [Completion(self._tokenizer, stop, config) for _ in prompts]
        ids = [self._tokenizer.encode(prompt, bos=True, control=True) for prompt in prompts]
        arriving = (
            self.stream_tokens(ids, config) if draws is None else self.stream_tokens(ids, config, draws)
        )
        for new in arriving:
            for row, tokens in zip(rows, new, strict=True):
                row.push(tokens)
            yield rows
            if all(row.stop_reason is not None for row in rows):
                return

    def generate_tokens(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> list[list[int]]:
        """The new tokens of each tokenised prompt, including the stop token that ended it, if one did."""
        rows: list[list[int]] = [[] for _ in prompts]
        for new in self.stream_tokens(prompts, config):
            for row, ids in zip(rows, new, strict=True):
                row.extend(ids)
        return rows

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        draws: Sequence[Draw] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Repeatedly yields the next tokens of every row (none after its stop token).

        Args:
            draws: as in `complete`.

        Raises:
            UserError: a prompt is empty, or holds an id that is not a token of the model; or the model's logits are
                NaN.
        """
        if not prompts:
            return
        self._check(prompts)
        stop = self._stop_tokens(config)
        generation = self._generation(self._batch(prompts, config, draws))
        left = [config.max_new_tokens] * len(prompts)  # tokens until a row has finished
        new, steps = generation.first(), _FIRST_STEPS
        while True:
            rows = [row if more else [] for row, more in zip(new, left, strict=True)]
            self._check_chosen(rows)
            yield rows
            left = [
                0 if row and row[-1] in stop else more - len(row)
                for row, more in zip(rows, left, strict=True)
            ]
            if not any(left):
                return
            steps = min(steps, max(left))
            start = time.perf_counter()
            new = generation.more(steps)
            steps = _pace(steps, time.perf_counter() - start)

    def _batch(
        self, prompts: Sequence[Sequence[int]], config: SamplingConfig, draws: Sequence[Draw] | None = None
    ) -> PromptBatch:
        lengths = [len(prompt) for prompt in prompts]
        padded = np.zeros((len(prompts), bucket(max(lengths))), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        return PromptBatch(
            padded,
            np.array(lengths, np.int32),
            _keys(config.seed, draws or [Draw(prompt) for prompt in range(len(prompts))]),
            jnp.array(sorted(self._stop_tokens(config)), jnp.int32),
            config.max_new_tokens,
            TokenChoice(config.temperature, config.top_k, config.top_p),
        )

    def _generation(self, batch: PromptBatch) -> Generation:
        if self._draft is None:
            return Plain(self._decoder, batch, bucket(batch.positions))
        useful = max(1, batch.max_new_tokens - 1)  # more proposals than tokens to come would only take memory
        models = Models(self._decoder, self._draft, min(self._draft_tokens, useful))
        size = bucket(batch.positions + models.draft_tokens)
        return Speculative(models, batch, size, self.draft_statistics)

    def _check_chosen(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises UserError if a chosen id is V, which stands for NaN logits."""
        if max(map(max, filter(None, rows)), default=0) >= self._decoder.config.vocab_size:
            raise UserError(
                "The model's logits are NaN, so no token can be chosen; its weights hold NaN or infinite numbers, "
                "or are too large for the dtype that it computes in."
            )

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        tokens = self._decoder.config.num_tokens
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(
                    f"Prompt {index} has no tokens; it needs at least the beginning-of-text token."
                )
            if not 0 <= min(prompt) <= max(prompt) < tokens:
                raise UserError(
                    f"Prompt {index} holds a token id that the model does not have; accepted: ids 0 to {tokens - 1}."
                )

    def _stop_tokens(self, config: SamplingConfig) -> frozenset[int]:
        if config.stop_tokens is None:
            return self._tokenizer.stop_ids
        return frozenset(config.stop_tokens)


def _keys(seed: int, draws: Sequence[Draw]) -> jax.Array:
    """A random key for each row [B], determined by the seed and its draw alone, whatever the other rows are."""
    seeds = np.array([(seed + draw.sample) % 2**32 for draw in draws], np.uint32)
    return _row_keys(seeds, np.array([draw.prompt for draw in draws], np.uint32))


@jax.jit
@jax.vmap
def _row_keys(seed: jax.Array, prompt: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), prompt)


def check_draft(model: ModelConfig, draft: ModelConfig, draft_tokens: int) -> None:
    """Raises UserError if a draft has another number of tokens than the model, or `draft_tokens` is below 1."""
    if draft.num_tokens != model.num_tokens:
        raise UserError(
            f"The draft has {draft.num_tokens} tokens and the model {model.num_tokens}; a draft must have the model's "
            "tokenizer."
        )
    if draft_tokens < 1:
        raise UserError(f"draft_tokens is {draft_tokens}; it must be at least 1.")


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, …: few sizes to compile for, with at most half of one unused."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _pace(steps: int, seconds: float) -> int:
    """The number of steps for the next dispatch, given the number and the time of the last one."""
    if seconds > _SECONDS:
        return max(1, steps // 2)
    return min(MAX_STEPS, steps * 2) if seconds < _SECONDS / 2 else steps
