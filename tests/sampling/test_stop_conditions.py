"""Stops as a person gives them."""

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.stop_conditions import with_stops


def test_texts_ids_and_names(tokenizer):
    found = with_stops(SamplingConfig(top_k=3), tokenizer, ["\n\n", "17", "<bos>", "the", "<end_of_turn>"])
    # The last one stands for a text; the name of a control token does not.
    assert found == SamplingConfig(
        top_k=3, stop_tokens=(1, 2, 5, 17), stop_texts=("\n\n", "the", "<end_of_turn>")
    )


def test_a_chat_ends_with_the_turn(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer._pieces.serialized_model_proto())
    base = Tokenizer.load(path, [1])  # a model that was not tuned to chats
    assert with_stops(SamplingConfig(), base, ["7"]).stop_tokens == (1, 7)
    assert with_stops(SamplingConfig(), base, [], chat=True).stop_tokens == (1, 5)


def test_an_id_that_is_none(tokenizer):
    with pytest.raises(UserError, match=r"^--stop is 310; accepted: a text, or a token id from 0 to 309\.$"):
        with_stops(SamplingConfig(), tokenizer, ["310"])
    with pytest.raises(UserError, match=r"stop_texts holds an empty text"):
        with_stops(SamplingConfig(), tokenizer, [""])
