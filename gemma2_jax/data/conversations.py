"""Conversations in the formats that people have, as turns.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}   OpenAI, Hugging Face
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}       ShareGPT
    {"prompt": "Hello", "completion": "Hi!"}
    {"instruction": "Greet.", "input": "in English", "output": "Hello!"}                            Alpaca

The keys decide the format, in this order. In all of them, a text under the key `system` is a system turn. Within data
preparation, a conversation is a document like any other: the JSON of its turns, [["user", "Hello"], ["model", "Hi!"]].
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gemma2_jax.data.config import ConversationsConfig
from gemma2_jax.data.fields import Record, without_surrogates
from gemma2_jax.data.globs import RECORDS
from gemma2_jax.data.invalid import Invalid

Turn = tuple[str, str]  # role (user or model; system until it is folded) and content

ACCEPTED = "messages, conversations, prompt and completion, or instruction and output"
_KEYS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
_ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "model", "model": "model", "gpt": "model",
}  # fmt: skip


class _InvalidError(Exception):
    """Fields that make no conversation. `problem`, `detail` and `hint` are those of `Invalid`."""

    def __init__(self, problem: str, detail: str = "", hint: str = "") -> None:
        self.problem, self.detail, self.hint = problem, detail, hint


class ConversationFields:
    """A record is the conversation that some fields hold, as `to_document` writes it (`Fields`)."""

    column = None
    formats = RECORDS

    def __init__(self, config: ConversationsConfig) -> None:
        self._fold = config.system == "fold"
        self.identity = f"conversations {config.system} {config.loss_on} {config.newline}"

    def missing(self, names: Collection[str], place: str) -> Invalid | None:
        return None if _format(dict.fromkeys(names, "")) else _no_conversation(names, place)

    def record(self, fields: Mapping[str, Any], names: Collection[str], place: str) -> Record:
        found = _format(fields)
        if found is None:
            return _no_conversation(names, place)
        try:
            turns = _turns(fields, found)
            if fields.get("system") and (system := _text(fields["system"], "system")):
                turns.insert(0, ("system", system))
            turns = _checked(_without_system(turns, self._fold))
        except _InvalidError as error:
            return Invalid(place, error.problem, error.hint, error.detail)
        return without_surrogates(to_document(turns), place)


def to_document(turns: Sequence[Turn]) -> str:
    """Returns the JSON of turns."""
    return json.dumps(turns, ensure_ascii=False)


def from_document(document: str) -> list[Turn]:
    """Returns the turns of a document."""
    return [(role, content) for role, content in json.loads(document)]


def text_of(document: str) -> str:
    """Returns the contents of a conversation's turns, one after another."""
    return "\n".join(content for _, content in from_document(document))


def _format(fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys that decide the format. A key without a value, as in a row of Parquet, does not count."""
    return next((keys for keys in _KEYS if all(fields.get(key) is not None for key in keys)), None)


def _no_conversation(names: Collection[str], place: str) -> Invalid:
    return Invalid(
        place, "no conversation", f"accepted: {ACCEPTED}", f"its keys are {', '.join(names) or 'none'}"
    )


def _turns(fields: Mapping[str, Any], keys: tuple[str, ...]) -> list[Turn]:
    if keys == ("prompt", "completion"):
        return [
            ("user", _text(fields["prompt"], "prompt")),
            ("model", _text(fields["completion"], "completion")),
        ]
    if keys == ("instruction", "output"):
        given = fields.get("input")
        parts = [_text(fields["instruction"], "instruction"), "" if given is None else _text(given, "input")]
        return [("user", "\n\n".join(filter(None, parts))), ("model", _text(fields["output"], "output"))]
    (key,) = keys
    messages = fields[key]
    if not isinstance(messages, list):
        raise _InvalidError(f"{key} holds {type(messages).__name__}", hint="it must be a list of messages")
    return [_turn(message, f"{key}[{index}]") for index, message in enumerate(messages)]


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise _InvalidError("a message is not an object", f"{place} is {type(message).__name__}")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if message.get(role_key) is not None and content_key in message:
            break
    else:
        raise _InvalidError(
            "a message of unknown keys",
            f"{place} has {', '.join(message) or 'none'}",
            "accepted: role and content, or from and value",
        )
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise _InvalidError(
                "a message with a call of a tool", f"{place} has {name}", "accepted: text only"
            )
    if message.get("weight") == 0:
        raise _InvalidError(
            "a message with weight 0",
            place,
            "data.conversations.loss_on decides which turns carry loss, the same ones in every conversation",
        )
    role = message[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise _InvalidError("an unknown role", f"{place} has {role!r}", f"accepted: {', '.join(_ROLES)}")
    return _ROLES[role], _text(message[content_key], f"{place}.{content_key}")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _InvalidError("a content that is not text", f"{place} holds {type(value).__name__}")
    return value.strip()


def _without_system(turns: list[Turn], fold: bool) -> list[Turn]:
    """Folds a system turn at the beginning into the first user turn."""
    if not turns or turns[0][0] != "system":
        return turns
    if not fold:
        raise _InvalidError(
            "a system turn, which Gemma 2's chat format lacks",
            hint="data.conversations.system=fold puts its text before the first user turn",
        )
    (_, system), *rest = turns
    if not rest or rest[0][0] != "user":
        return turns  # which do not alternate
    return [("user", "\n\n".join(filter(None, (system, rest[0][1])))), *rest[1:]]


def _checked(turns: list[Turn]) -> list[Turn]:
    roles = [role for role, _ in turns]
    if not turns:
        raise _InvalidError("a conversation without messages")
    wrong = next((index for index, role in enumerate(roles) if role != ("user", "model")[index % 2]), None)
    if wrong is not None:
        before = f" after {roles[wrong - 1]}" if wrong else ""
        raise _InvalidError(
            "roles that do not alternate",
            f"turn {wrong + 1} of {len(roles)} is {roles[wrong]}{before}",
            "accepted: user, model, user, model, and so on",
        )
    if "model" not in roles:
        raise _InvalidError(
            "a conversation without a turn of the model", hint="nothing in it would carry loss"
        )
    return turns
