import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template, render
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.formats.tokenizer_files import write_tokenizer_files

TURNS = ["<start_of_turn>", "<end_of_turn>"]
# As in Gemma's own file, ids 4 to 107 and on: the turn tokens come late, and there is <mask> and HTML.
GEMMA_PIECES = [
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{number}>" for number in range(99)),
    *TURNS,
    *("\n" * length for length in range(1, 32)),
    *("▁" * length for length in range(2, 32)),
    "<table>",
    "</table>",
    "<b>",
]
GEMMA_SETTINGS: dict[str, Any] = dict(
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece="<pad>",
    eos_piece="<eos>",
    bos_piece="<bos>",
    unk_piece="<unk>",
)
# Runs, so that there are pieces which can be put together in several ways.
RUNS = [" ".join(sign * length for length in range(1, 25)) for sign in "a-=*"] * 20 + ["ababbabaab" * 9] * 20


def trained(texts: list[str], vocab_size: int, **settings: Any) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["trained here", "with Gemma's ids"])
def model(
    request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """Content of a SentencePiece model file: one trained here, and one laid out like Gemma's."""
    if request.param == "with Gemma's ids":
        return trained([*texts, *RUNS], 700, user_defined_symbols=GEMMA_PIECES, **GEMMA_SETTINGS)
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*texts, *RUNS], path, 500)
    return path.read_bytes()


@pytest.fixture(scope="module")
def ours(model: bytes) -> Tokenizer:
    return Tokenizer(model, "The tokenizer")


@pytest.fixture(scope="module")
def folder(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "new"
    write_tokenizer_files(folder, model)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra `reference`: pip install -e '.[reference]'"
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")),
    st.text("ab -=\n", max_size=40),
    st.builds(lambda sign, length: sign * length, st.sampled_from(" \n\ta-="), st.integers(1, 70)),
    st.sampled_from(
        [*TURNS, *GEMMA_PIECES[:5], "<b>", "</table>", "<0x41>", "\0", "\r\n", "😀", "e\u0301", "12345"]
    ),
    st.sampled_from(["the model", " teacher", "probability of every token", "<start_of_", "turn>"]),
)
# Only transformers takes these for tokens, see tokenizer_files.py; Hypothesis knows them from the project's source.
ONLY_THEIRS = ("<bos>", "<eos>", "<pad>", "<unk>")
documents = (
    st.lists(words, max_size=8).map("".join).filter(lambda text: not any(map(text.__contains__, ONLY_THEIRS)))
)


@given(documents)
@settings(max_examples=300)
@example("")
@example(" leading, trailing ")
@example(" " * 40 + "x")  # longer than the longest piece: transformers by itself cuts this up in another way
@example("<mask>")  # which transformers by itself gives an id that the model has no row for
@example("\ufeff\0\0 \u2028\u200d\U0010ffff")
def test_ids_and_texts_are_ours(theirs, ours: Tokenizer, text: str):
    ids = ours.encode(text, bos=True, control=True)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids[1:]) == ours.decode(ids)


@given(st.lists(st.integers(4, 499)))
def test_any_pieces_become_the_same_text(theirs, ours: Tokenizer, ids: list[int]):
    # Not bytes, which by themselves are no text.
    ids = [number for number in ids if not ours.piece(number).startswith("<0x")]
    assert theirs.decode(ids) == ours.decode(ids)


@given(documents, documents)
def test_chats_are_ours(theirs, ours: Tokenizer, question: str, answer: str):
    chat = [
        {"role": role, "content": content.replace("_of_turn", "")}
        for role, content in (("user", question), ("assistant", answer), ("user", question))
    ]
    found = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found == ours.encode(render(chat, generation_prompt=True), bos=True, control=True)


def test_special_tokens_are_ours(theirs, ours: Tokenizer):
    assert len(theirs) == ours.vocab_size  # none was added behind
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    assert theirs.mask_token is None
    assert theirs.convert_tokens_to_ids("<end_of_turn>") == ours.end_of_turn_id
    ids = ours.encode("<start_of_turn>hi<end_of_turn>", bos=True, eos=True, control=True)
    assert theirs.decode(ids, skip_special_tokens=True) == "hi"
    assert theirs.chat_template == chat_template()


def test_differences_are_those_in_the_docstring(theirs, ours: Tokenizer):
    for number, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>"]):
        assert theirs(piece)["input_ids"] == [2, number]
        assert number not in ours.encode(piece, control=True)
    assert theirs("▁")["input_ids"] == theirs(" ")["input_ids"] == ours.encode(" ", bos=True)
    assert ours.decode(ours.encode("▁")) == theirs.decode(ours.encode("▁")) == "▁"
    assert theirs.decode(ours.encode("a", bos=True, eos=True)) == "<bos>a<eos>"
    assert (theirs.decode([3]), ours.decode([3])) == ("<unk>", " ⁇ ")
    cut = ours.encode("é😀")[:-1]
    assert (theirs.decode(cut), ours.decode(cut)) == ("\ufffd" * 5, "é" + "\ufffd" * 3)
    with pytest.raises(TypeError):
        theirs("\ud800")


def test_what_transformers_saves_again_is_the_same(theirs, ours: Tokenizer, tmp_path: Path):
    # It writes tokenizer.json, which programs without SentencePiece read.
    theirs.save_pretrained(tmp_path)
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "the model",
        " " * 70 + "x",
        "\n" * 70,
        "<mask>",
        "<start_of_turn>user\nété😀<end_of_turn>\n",
    ):
        assert again(text)["input_ids"] == ours.encode(text, bos=True, control=True)


def test_the_files(folder: Path, model: bytes):
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert (folder / "tokenizer.model").read_bytes() == model
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "GemmaTokenizer"
    assert config["additional_special_tokens"] == TURNS


def test_a_tokenizer_without_turns_and_padding(texts: list[str], tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    model = trained(texts, 400, **{**GEMMA_SETTINGS, "pad_id": -1, "eos_id": 0, "bos_id": 1, "unk_id": 2})
    write_tokenizer_files(tmp_path, model)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(model, "The tokenizer")
    assert theirs.chat_template is None
    assert theirs.pad_token_id == theirs.eos_token_id == ours.pad_id == 0
    assert len(theirs) == 400
    assert theirs("the model\n")["input_ids"] == ours.encode("the model\n", bos=True)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (dict(model_type="unigram"), "model_type is BPE"),
        (dict(byte_fallback=False), "byte_fallback is true"),
        (dict(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix is false"),
        (dict(add_dummy_prefix=True), "add_dummy_prefix is false"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces is false"),
        (dict(normalization_rule_name="nfkc"), "text is not normalised"),
    ],
)
def test_other_settings_are_refused(texts: list[str], tmp_path: Path, setting: dict[str, Any], sentence: str):
    model = trained(texts, 330, hard_vocab_limit=False, **{**GEMMA_SETTINGS, **setting})
    with pytest.raises(UserError, match=f"GemmaTokenizer; accepted: one whose {sentence}"):
        write_tokenizer_files(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"The tokenizer is not a SentencePiece model"):
        write_tokenizer_files(tmp_path, b"no model")
    assert not list(tmp_path.iterdir())
