"""Gemma 2's chat format.

    <start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

As published with the instruction-tuned models: turns alternate and begin with the user's, text is trimmed,
and there is no system role.
"""

from collections.abc import Mapping, Sequence

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import END_OF_TURN, START_OF_TURN

_ROLES = {"user": "user", "assistant": "model", "model": "model"}


def render(messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> str:
    """Returns the text of a chat, for `Tokenizer.encode(text, bos=True, control=True)`.

    The published template begins with `<bos>`, which is left to the tokenizer here: added twice, it makes
    a model worse without a word.

    Args:
        messages: each with a "role" (user, or assistant, also called model) and a "content".
        generation_prompt: end with the beginning of a turn of the model's, which it is to fill.

    Raises:
        UserError: no message; a system message or another role; turns that do not alternate; a content that
            holds a turn token, which would become one.
    """
    if not messages:
        raise UserError("A chat needs at least one message.")
    turns = []
    for index, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise UserError(
                f"Message {index} has the keys {', '.join(message)}; it must have role and content."
            )
        role, content = message["role"], message["content"].strip()
        if role not in _ROLES:
            hint = ", so put its text into the first user message" if role == "system" else ""
            raise UserError(
                f"Message {index} has the role {role!r}; Gemma 2 knows user and assistant only{hint}."
            )
        expected = "model" if index % 2 else "user"
        if _ROLES[role] != expected:
            raise UserError(
                f"Message {index} is from {role}; turns must alternate user/assistant and begin with the user's."
            )
        if START_OF_TURN in content or END_OF_TURN in content:
            raise UserError(
                f"Message {index} holds {START_OF_TURN} or {END_OF_TURN}, which only the chat format may."
            )
        turns.append(f"{START_OF_TURN}{expected}\n{content}{END_OF_TURN}\n")
    if generation_prompt:
        turns.append(f"{START_OF_TURN}model\n")
    return "".join(turns)
