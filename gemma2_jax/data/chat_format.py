"""Gemma 2's chat format.

    <start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

As published with the instruction-tuned models: turns alternate and begin with the user's, text is trimmed,
and there is no system role. The published Jinja template lies beside this file, for the programs that read one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import END_OF_TURN, START_OF_TURN

_ROLES = {"user": "user", "assistant": "model", "model": "model"}


def chat_template() -> str:
    """Returns the Jinja template that is published with google/gemma-2-2b-it, 9b-it and 27b-it."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def render(messages: Sequence[Mapping[str, object]], generation_prompt: bool = False) -> str:
    """Returns the text of a chat, for `Tokenizer.encode(text, bos=True, control=True)`.

    What the published template gives, with two differences. That begins with `<bos>`, which is left to the
    tokenizer here: added twice, it makes a model worse without a word. And it lets pass some chats that are
    refused here: turn tokens in a content, a role that the model does not know (a system message, too) in a place
    of the model's, and a content that is missing or no string.

    Args:
        messages: each with a "role" (user, or assistant, also called model) and a "content".
        generation_prompt: end with the beginning of a turn of the model's, which it is to fill.

    Raises:
        UserError: no message; a message without role or content; a content that is no string; a system message or
            another role; turns that do not alternate; a content that holds a turn token, which would become one.
    """
    if not messages:
        raise UserError("A chat needs at least one message.")
    turns = [_turn(index, message) for index, message in enumerate(messages)]
    if generation_prompt:
        turns.append(f"{START_OF_TURN}model\n")
    return "".join(turns)


def _turn(index: int, message: Mapping[str, object]) -> str:
    if not {"role", "content"} <= message.keys():
        raise UserError(f"Message {index} has the keys {', '.join(message)}; it must have role and content.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        hint = ", so put its text into the first user message" if role == "system" else ""
        raise UserError(
            f"Message {index} has the role {role!r}; Gemma 2 knows user and assistant only{hint}."
        )
    expected = "model" if index % 2 else "user"
    if _ROLES[role] != expected:
        raise UserError(
            f"Message {index} is from {role}; turns must alternate user/assistant and begin with the user's."
        )
    if not isinstance(content, str):
        raise UserError(
            f"Message {index} has a content of type {type(content).__name__}; it must be a string."
        )
    if START_OF_TURN in content or END_OF_TURN in content:
        raise UserError(
            f"Message {index} holds {START_OF_TURN} or {END_OF_TURN}, which only the chat format may."
        )
    return f"{START_OF_TURN}{expected}\n{content.strip()}{END_OF_TURN}\n"
