"""Encodes conversations as token ids with a loss mask.

The parts of a conversation's text are encoded one by one, so that the tokens of each part are known. Only the chat
format's own parts become control tokens: a content that looks like one is encoded as ordinary text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma2_jax.data.chat_format import turn_parts
from gemma2_jax.data.config import ConversationsConfig
from gemma2_jax.data.conversations import Turn
from gemma2_jax.data.tokenizer import Tokenizer


class MaskedTokens(NamedTuple):
    """A conversation's token ids, int [n], and whether each carries loss as a target, bool [n]."""

    ids: np.ndarray
    loss: np.ndarray


def encode_conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn], config: ConversationsConfig
) -> MaskedTokens:
    """Encodes turns as the published chat template does, beginning with one bos token.

    Content and terminator of the model's turns carry loss, as `config` says.

    Raises:
        UserError: the tokenizer has no turn tokens.
    """
    last = max((index for index, (role, _) in enumerate(turns) if role == "model"), default=-1)
    ids, loss = [tokenizer.bos_id], [False]
    for index, (role, content) in enumerate(turns):
        learned = role == "model" and (config.loss_on == "all" or index == last)
        header, content, terminator, newline = turn_parts(role, content)
        for part, control, carries in (
            (header, True, False),
            (content, False, learned),
            (terminator, True, learned),
            (newline, False, learned and config.newline),
        ):
            part_ids = tokenizer.encode(part, control=control)
            ids += part_ids
            loss += [carries] * len(part_ids)
    return MaskedTokens(np.array(ids), np.array(loss))


def to_record(tokens: MaskedTokens, dtype: np.dtype) -> bytes:
    """Returns the record of a conversation: its ids in `dtype`, then its mask, eight tokens per byte."""
    return tokens.ids.astype(dtype).tobytes() + np.packbits(tokens.loss).tobytes()


def from_record(record: bytes, dtype: np.dtype) -> MaskedTokens:
    """Returns the conversation of a record."""
    # n ids and their mask take n * itemsize + ceil(n / 8) bytes, which no other n does.
    count = 8 * len(record) // (8 * dtype.itemsize + 1)
    mask = np.frombuffer(record, np.uint8, offset=count * dtype.itemsize)
    return MaskedTokens(np.frombuffer(record, dtype, count), np.unpackbits(mask, count=count).astype(bool))
