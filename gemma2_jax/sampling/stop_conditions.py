"""Stop conditions as users give them: texts and token ids."""

from collections.abc import Sequence
from dataclasses import replace

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.sampling.config import SamplingConfig


def with_stops(
    config: SamplingConfig, tokenizer: Tokenizer, stops: Sequence[str], chat: bool = False
) -> SamplingConfig:
    """`config` with `stops` in addition to the checkpoint's own stop tokens.

    Args:
        stops: token ids, names of control tokens such as `<eos>`, or any other texts.
        chat: whether to stop at the end of the turn too, which is no stop token of a model that was not tuned for chat.

    Raises:
        UserError: an id is not in the vocabulary, or a text is empty.
    """
    ids = set(tokenizer.stop_ids)
    if chat:
        ids.add(tokenizer.end_of_turn_id)
    texts = []
    for stop in stops:
        number = int(stop) if stop.isdecimal() else tokenizer.control_id(stop)
        if number is None:
            texts.append(stop)
        elif number < tokenizer.vocab_size:
            ids.add(number)
        else:
            raise UserError(
                f"--stop is {stop}; accepted: a text, or a token id from 0 to {tokenizer.vocab_size - 1}."
            )
    return replace(config, stop_tokens=tuple(sorted(ids)), stop_texts=tuple(texts))
