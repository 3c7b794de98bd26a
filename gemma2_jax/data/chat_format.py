"""Gemma 2's chat format.

    <start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

As published with the instruction-tuned models: turns alternate, the first is the user's, text is trimmed, and there is
no system role. The published Jinja template is beside this file, for programs that need it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import END_OF_TURN, START_OF_TURN

_ROLES = {"user": "user", "assistant": "model", "model": "model"}


def chat_template() -> str:
    """Returns the Jinja template published with google/gemma-2-2b-it, 9b-it and 27b-it."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def render(messages: Sequence[Mapping[str, object]], generation_prompt: bool = False) -> str:
    """Returns the text of a chat, for `Tokenizer.encode(text, bos=True, control=True)`.

    The text equals the published template's, with two differences. The template begins with `<bos>`, which the
    tokenizer adds here: adding it twice would silently make a model worse. And the template accepts some chats that
    raise an error here: turn tokens in the content, an unknown role (even system) in place of the model's, and
    content that is missing or not a string.

    Args:
        messages: messages with a "role" (user, or assistant, also called model) and a "content".
        generation_prompt: whether to end with the beginning of a model's turn, for the model to complete.

    Raises:
        UserError: there is no message; a message lacks role or content; its content is not a string or contains a
            turn token; its role is system or unknown; or turns do not alternate.
    """
    if not messages:
        raise UserError("A chat needs at least one message.")
    turns = [_turn(index, message) for index, message in enumerate(messages)]
    if generation_prompt:
        turns.append(f"{START_OF_TURN}model\n")
    return "".join(turns)


def turn_parts(role: str, content: str) -> tuple[str, str, str, str]:
    """Returns the parts of a turn's text: header, content, terminator, and the newline after it.

    Args:
        role: user or model.
    """
    return f"{START_OF_TURN}{role}\n", content.strip(), END_OF_TURN, "\n"


def _turn(index: int, message: Mapping[str, object]) -> str:
    if not {"role", "content"} <= message.keys():
        raise UserError(f"Message {index} has the keys {', '.join(message)}; it must have role and content.")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; put its text into the first user message" if role == "system" else ""
        raise UserError(f"Message {index} has the role {role!r}; accepted: user and assistant{hint}.")
    expected = "model" if index % 2 else "user"
    if _ROLES[role] != expected:
        raise UserError(
            f"Message {index} has the role {role!r}; turns must alternate user/assistant and begin with user."
        )
    if not isinstance(content, str):
        raise UserError(
            f"Message {index} has a content of type {type(content).__name__}; it must be a string."
        )
    if START_OF_TURN in content or END_OF_TURN in content:
        raise UserError(
            f"Message {index} contains {START_OF_TURN} or {END_OF_TURN}, which only the chat format may add."
        )
    return "".join(turn_parts(expected, content))
