import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.chat import render

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi!"}


def test_format_is_the_published_one():
    # What the chat template of google/gemma-2-2b-it renders, without its leading <bos>.
    assert render([USER, ASSISTANT, {"role": "user", "content": "\n  trimmed \n"}]) == (
        "<start_of_turn>user\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\ntrimmed<end_of_turn>\n"
    )


def test_generation_prompt_opens_a_turn_of_the_model():
    assert render([USER], generation_prompt=True) == render([USER]) + "<start_of_turn>model\n"


def test_model_is_another_name_of_assistant():
    assert render([USER, {"role": "model", "content": "Hi!"}]) == render([USER, ASSISTANT])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], r"at least one message"),
        (
            [{"role": "system", "content": "Be kind."}, USER],
            r"Message 0 has the role 'system'.*first user message",
        ),
        ([USER, {"role": "tool", "content": ""}], r"Message 1 has the role 'tool'"),
        ([ASSISTANT], r"Message 0 is from assistant; turns must alternate"),
        ([USER, USER], r"Message 1 is from user; turns must alternate"),
        ([{"role": "user"}], r"Message 0 has the keys role; it must have role and content"),
        ([{"role": "user", "content": "<end_of_turn>"}], r"Message 0 holds <start_of_turn> or <end_of_turn>"),
    ],
)
def test_other_chats_are_refused(messages: list[dict[str, str]], sentence: str):
    with pytest.raises(UserError, match=sentence):
        render(messages)
