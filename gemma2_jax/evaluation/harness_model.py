"""A Gemma 2 as a model of the language-model evaluation harness. Imports lm-eval, which is in the extra `eval`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template, render
from gemma2_jax.data.tokenizer import END_OF_TURN, Tokenizer
from gemma2_jax.evaluation.continuations import (
    ContinuationScorer,
    ScoredText,
    continuation_window,
    rolling_windows,
)
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sampling.completion import Completion, Draw
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler

Show = Callable[[str, int, int], None]  # (kind of request, number done, total)

_MAX_NEW_TOKENS = 256  # of tasks that give no number, as in the harness's own models
_LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first given one counts


class HarnessModel(TemplateLM):
    """Answers the harness's requests: log-likelihoods of continuations and of whole texts, and generated texts.

    Every text that the model processes begins with exactly one beginning-of-text token: Gemma's predictions without it
    are poor (9B on LAMBADA: perplexity 2645).

    Args:
        chat: whether the tasks' prompts are in chat format, so that turn markers in them are control tokens.
        max_length: the model's context in tokens; longer prompts lose tokens at their beginning.
        show: called with the progress of each kind of request.
    """

    def __init__(
        self,
        model: Gemma2,
        tokenizer: Tokenizer,
        compute: ComputeConfig,
        batch_size: int,
        max_length: int,
        chat: bool = False,
        mesh: Mesh | None = None,
        show: Show = lambda kind, done, total: None,
    ) -> None:
        super().__init__()
        self._model, self._pieces, self._compute = model, tokenizer, compute
        self._scorer = ContinuationScorer(model, compute, batch_size, mesh)
        self._sampler: Sampler | None = None
        self._batch_size, self._max_length, self._chat, self._show = batch_size, max_length, chat, show

    @property
    def eot_token_id(self) -> int:
        return self._pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._pieces.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"sentencepiece-{self._pieces.fingerprint}"

    def chat_template(self, chat_template_name: bool | str = False) -> str:
        return chat_template() if chat_template_name else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a chat, without the beginning-of-text token, which `tok_encode` adds.

        Gemma 2 has no system role. As in the harness's own models, a task's description, which the harness makes a
        system message, is left out.
        """
        turns = [message for message in chat_history if message["role"] != "system"]
        text = render(turns, generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(f"{END_OF_TURN}\n")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the token ids of a text, after the beginning-of-text id unless `add_special_tokens` is False."""
        bos = add_special_tokens is not False
        text = string.removeprefix(self._pieces.piece(self._pieces.bos_id)) if bos else string
        return self._pieces.encode(text, bos=bos, control=self._chat)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = [
            continuation_window(context, continuation, self._max_length)
            for _, context, continuation in requests
        ]
        return [(score.log_prob, score.is_greedy) for score in self._score("continuations", windows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[ScoredText] = []
        ends: list[int] = []
        for (text,) in (request.args for request in requests):
            windows += rolling_windows(
                self.tok_encode(text, add_special_tokens=False), self._pieces.bos_id, self._max_length
            )
            ends.append(len(windows))
        scores = [score.log_prob for score in self._score("texts", windows)]
        return [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _score(self, kind: str, windows: Sequence[ScoredText]) -> Any:
        return self._scorer.score(windows, lambda done: self._show(kind, done, len(windows)))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        alike: dict[SamplingConfig, list[int]] = {}
        for index, (_, options) in enumerate(request.args for request in requests):
            alike.setdefault(self._sampling(options), []).append(index)
        texts = [""] * len(requests)
        done = 0
        for config, indices in alike.items():
            prompts = {index: self._prompt(requests[index].args[0], config) for index in indices}
            ordered = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
            size = min(self._batch_size, len(ordered))
            for first in range(0, len(ordered), size):
                batch = ordered[first : first + size]
                # The last batch is filled up, so that it needs no other program; a copy ends with its original.
                filled = batch + batch[:1] * (size - len(batch))
                rows = self._complete([prompts[index] for index in filled], filled, config)
                for index, row in zip(batch, rows, strict=False):
                    texts[index] = self._text(row.tokens, config)
                done += len(batch)
                self._show("generations", done, len(requests))
        return texts

    def _complete(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], config: SamplingConfig
    ) -> list[Completion]:
        if self._sampler is None:
            self._sampler = Sampler(self._model, self._pieces, self._compute)
        stop = frozenset(config.stop_tokens or ())
        rows = [Completion(self._pieces, stop, config) for _ in prompts]
        for new in self._sampler.stream_tokens(prompts, config, [Draw(number) for number in numbers]):
            for row, tokens in zip(rows, new, strict=True):
                row.push(tokens)
            if all(row.stop_reason is not None for row in rows):
                break
        return rows

    def _text(self, tokens: Sequence[int], config: SamplingConfig) -> str:
        """The text of a completion up to its first stop text, without turn tokens, which the harness leaves out."""
        lengths = self._pieces.byte_lengths()
        text = self._pieces.decode(token for token in tokens if lengths[token])
        for stop in config.stop_texts:
            text = text.split(stop)[0]
        return text

    def _prompt(self, text: str, config: SamplingConfig) -> list[int]:
        room = self._max_length - config.max_new_tokens
        if room < 2:
            raise UserError(
                f"it generates up to {config.max_new_tokens} tokens, which leaves no room for a prompt in a context of "
                f"{self._max_length}; give a larger context"
            )
        ids = self.tok_encode(text)
        return ids if len(ids) <= room else [ids[0], *ids[1 - room :]]

    def _sampling(self, options: Mapping[str, Any]) -> SamplingConfig:
        """Returns the sampler's settings for a task's `generation_kwargs`.

        Raises:
            UserError: an option is not known.
        """
        known = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(
                f"its generation_kwargs have {', '.join(unknown)}; accepted: {', '.join(sorted(known))}."
            )
        until = options.get("until") or []
        lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
        temperature, samples = options.get("temperature"), options.get("do_sample")
        if samples is None:
            samples = bool(temperature)
        stop = set(self._pieces.stop_ids) | ({self._pieces.end_of_turn_id} if self._chat else set())
        return SamplingConfig(
            max_new_tokens=int(lengths[0]) if lengths else _MAX_NEW_TOKENS,
            temperature=float(1.0 if temperature is None else temperature) if samples else 0.0,
            top_k=(options.get("top_k") or None) if samples else None,
            top_p=options.get("top_p") if samples else None,
            stop_tokens=tuple(sorted(stop)),
            stop_texts=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        )
