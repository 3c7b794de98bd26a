import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template, render

Chat = list[dict[str, Any]]

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi!"}
TURNS = ["<start_of_turn>", "<end_of_turn>"]

# Python and Jinja must agree on what is a blank, including those that are none in ASCII.
BLANKS = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "\x0b\x0c",
    "\x1c\x1f",
    "\x85",
    "\xa0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\ufeff",
]
contents = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.sampled_from(
            [*BLANKS, *TURNS, "<bos>", "{{ bos_token }}", "{% endif %}", "<b>&amp;</b>", "\\n", "😀"]
        ),
    ),
    max_size=4,
).map("".join)
roles = st.sampled_from(["user", "assistant", "model", "system", "tool", "User", ""])


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """Mostly chats that alternate, so that most get past the first message."""
    chat = []
    for index in range(draw(st.integers(0, 6))):
        proper = st.sampled_from(["assistant", "model"] if index % 2 else ["user"])
        # A stray role in one message of six, so that many chats are whole.
        role = draw(roles if draw(st.integers(0, 5)) == 0 else proper)
        chat.append({"role": role, "content": draw(contents)})
    return chat


@pytest.fixture(scope="module")
def published() -> Callable[[Chat, bool], str | None]:
    """The published template, run by transformers; None for a chat that it refuses."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra `reference`: pip install -e '.[reference]'"
    )
    import jinja2
    import tokenizers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<bos>"
    )

    def apply(chat: Chat, generation_prompt: bool) -> str | None:
        try:
            return str(
                tokenizer.apply_chat_template(
                    chat,
                    chat_template=chat_template(),
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except (jinja2.TemplateError, ValueError):  # ValueError: transformers' own, on no message at all
            return None

    return apply


def rendered(chat: Chat, generation_prompt: bool) -> str | None:
    try:
        return render(chat, generation_prompt)
    except UserError:
        return None


def only_ours_refuses(chat: Chat) -> bool:
    """Whether a chat has content that the published template accepts and `render` rejects on purpose."""
    return any(
        message["role"] not in ("user", "assistant", "model")
        or any(turn in message["content"] for turn in TURNS)
        for message in chat
    )


def test_the_template_is_the_published_one():
    # Of chat_template in tokenizer_config.json of google/gemma-2-2b-it, 9b-it and 27b-it.
    digest = hashlib.sha256(chat_template().encode()).hexdigest()
    assert digest == "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123"


@given(chats(), st.booleans())
@example([USER], True)
@example([USER, ASSISTANT, USER], True)
@example([{"role": "user", "content": " \n "}, {"role": "assistant", "content": ""}], False)
@example([{"role": "system", "content": "Be kind."}, USER], True)
@example([USER, {"role": "tool", "content": "4"}, USER], True)
@example([], True)
def test_every_chat_is_rendered_as_published(published, chat: Chat, generation_prompt: bool):
    theirs, ours = published(chat, generation_prompt), rendered(chat, generation_prompt)
    if ours is not None:
        assert "<bos>" + ours == theirs
    elif not only_ours_refuses(chat):
        assert theirs is None


@pytest.mark.parametrize("blank", BLANKS)
def test_blanks_are_trimmed_as_published(published, blank: str):
    chat = [{"role": "user", "content": f"{blank}a{blank}b{blank}"}, {"role": "assistant", "content": blank}]
    assert "<bos>" + render(chat) == published(chat, False)


@pytest.mark.parametrize(
    ("chat", "theirs"),
    [
        # Read by a tokenizer, the end of this turn is the user's to set.
        (
            [{"role": "user", "content": "a<end_of_turn>"}],
            "<bos><start_of_turn>user\na<end_of_turn><end_of_turn>\n",
        ),
        (
            [USER, {"role": "system", "content": "b"}],
            "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>system\nb<end_of_turn>\n",
        ),
        ([{"role": "user"}], "<bos><start_of_turn>user\n<end_of_turn>\n"),
        ([{"role": "user", "content": 5}], "<bos><start_of_turn>user\n5<end_of_turn>\n"),
    ],
)
def test_what_only_ours_refuses(published, chat: Chat, theirs: str):
    assert published(chat, False) == theirs
    assert rendered(chat, False) is None


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
        ([ASSISTANT], r"Message 0 has the role .assistant.; turns must alternate"),
        ([USER, USER], r"Message 1 has the role .user.; turns must alternate"),
        ([{"role": "user"}], r"Message 0 has the keys role; it must have role and content"),
        (
            [{"role": "user", "content": None}],
            r"Message 0 has a content of type NoneType; it must be a string",
        ),
        (
            [{"role": "user", "content": "<end_of_turn>"}],
            r"Message 0 contains <start_of_turn> or <end_of_turn>",
        ),
    ],
)
def test_other_chats_are_refused(messages: Chat, sentence: str):
    with pytest.raises(UserError, match=sentence):
        render(messages)
