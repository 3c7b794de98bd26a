import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer

SPECIAL = [
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<0x41>",
    "▁",
    "▁▁",
    "⁇",
    "▅",
]
text = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates are no text in UTF-8
pieces = st.one_of(
    text, st.sampled_from([*SPECIAL, "\n\n\n\n\n\n", " " * 40, "\0", "\t", "\r\n", "😀", "12345"])
)


@given(st.lists(pieces, max_size=8).map("".join))
@example("  leading, trailing  \n")
@example("\ufeff\0\0 \u2028 e\u0301 \u200d")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@given(st.lists(pieces, max_size=8).map("".join))
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str):
    assert min(tokenizer.encode(text), default=6) >= 6  # 0 to 5 are the control tokens


def test_ids_are_those_of_gemma(tokenizer: Tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 400
    assert tokenizer.encode("", bos=True, eos=True) == [2, 1]


def test_pieces_are_those_of_the_file(tokenizer: Tokenizer):
    assert [tokenizer.piece(number) for number in tokenizer.encode("  λ\n")] == [
        "▁▁",
        "<0xCE>",
        "<0xBB>",
        "\n",
    ]
    assert tokenizer.piece(tokenizer.bos_id) == "<bos>"
    for number in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"Token id {number} is not in"):
            tokenizer.piece(number)


def test_turns_are_control_tokens_on_demand(tokenizer: Tokenizer):
    turn = "<start_of_turn>user\nhi<end_of_turn>\n"
    ids = tokenizer.encode(turn, control=True)
    assert ids[0] == 4
    assert ids.count(tokenizer.end_of_turn_id) == 1
    assert tokenizer.decode(ids) == turn
    inner = tokenizer.encode("user\nhi")
    assert ids == [4, *inner, tokenizer.end_of_turn_id, *tokenizer.encode("\n")]


@given(st.lists(pieces, max_size=8).map("".join))
def test_lengths_of_tokens_add_up_to_that_of_the_text(tokenizer: Tokenizer, text: str):
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.vocab_size
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert sum(lengths[number] for number in ids) == len(text.encode())
    turns = tokenizer.encode("<start_of_turn><end_of_turn>", control=True)
    assert [lengths[number] for number in turns] == [0, 0]


def test_digits_are_split_and_runs_are_kept_whole(tokenizer: Tokenizer):
    assert [tokenizer.decode([number]) for number in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    assert len(tokenizer.encode("\n\n\n\n")) == 1
    assert len(tokenizer.encode(" " * 16)) == 1


def test_training_is_deterministic(texts: list[str], tmp_path: Path):
    first, second = (train_tokenizer(texts, tmp_path / name, 380) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert train_tokenizer(texts[::2], tmp_path / "c", 380).fingerprint != first.fingerprint


def test_training_uses_long_documents(tmp_path: Path):
    # Longer than SentencePiece's own limit (4192 bytes), in one line and in many.
    document = "zyzzyva " * 2000 + "\n" + "quokka\n" * 2000
    trained = train_tokenizer([document], tmp_path / "model", 300)
    assert len(trained.encode("zyzzyva")) <= 2
    assert len(trained.encode("quokka")) <= 2


@pytest.mark.parametrize(
    ("size", "bound"), [(280, "; this text needs at least"), (200_000, ", but this text supports at most")]
)
def test_impossible_sizes_are_refused_with_the_bound(texts: list[str], tmp_path: Path, size: int, bound: str):
    with pytest.raises(UserError, match=rf"vocab_size is {size}{bound} \d+\.$"):
        train_tokenizer(texts, tmp_path / "model", size)
    assert not (tmp_path / "model").exists()


def test_training_on_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"400"):
        train_tokenizer([], tmp_path / "model", 400)


@pytest.mark.parametrize("error", [UserError("line 3 is no JSON."), KeyboardInterrupt(), ZeroDivisionError()])
def test_what_ends_the_documents_stays_what_it_is(tmp_path: Path, error: BaseException):
    """SentencePiece reads them from C++, and raises a RuntimeError instead."""

    def documents():
        yield "some text"
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(documents(), tmp_path / "t.model", 300)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_gemmas_own_layout_is_read_by_name(texts: list[str], tmp_path: Path):
    # Gemma's file has <mask>, two more and <unused0> to <unused98> before the turn tokens.
    symbols = [
        "<mask>",
        "<2mass>",
        "[@BOS@]",
        *(f"<unused{i}>" for i in range(99)),
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=symbols, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    assert tokenizer.end_of_turn_id == 107
    assert tokenizer.encode("<start_of_turn>", control=True) == [106]
    assert 106 not in tokenizer.encode("<start_of_turn>")


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"No such file"):
        Tokenizer.load(tmp_path / "absent.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "bad.model"))):
            Tokenizer.load(tmp_path / "bad.model")


def test_what_cannot_be_encoded_or_decoded_is_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(UserError, match=r"Token id 400 .* ids 0 to 399"):
        tokenizer.decode([5, 400])
    with pytest.raises(UserError, match=r"Token id -1"):
        tokenizer.decode([-1])


def test_a_character_cut_in_half_is_a_replacement(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("😀")[:-1]) == "\ufffd" * 3


def test_text_of_nothing_but_nul_is_reported_without_source_lines(tmp_path):
    with pytest.raises(
        UserError, match=r"^No tokenizer can be trained on this text: it contains no characters"
    ):
        train_tokenizer(["\0" * 5000], tmp_path / "x.model", 300)
