"""Settings that make no sense are refused in one sentence."""

import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.sampling.config import SamplingConfig


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens is 0; it must be at least 1."),
        ({"temperature": -0.5}, "sampling.temperature is -0.5; it must be a number from 0"),
        ({"temperature": float("nan")}, "sampling.temperature is nan; it must be a number from 0"),
        ({"top_k": 0}, "sampling.top_k is 0; it must be at least 1, or null"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5; it must be above 0 and at most 1"),
        ({"seed": -1}, "sampling.seed is -1; it must be from 0 to 4294967295."),
        ({"stop_texts": ("a", "")}, "sampling.stop_texts holds an empty text"),
        ({"stop_tokens": (1, -1)}, "sampling.stop_tokens holds -1; token ids begin at 0."),
    ],
)
def test_refused(setting, sentence):
    with pytest.raises(UserError) as error:
        SamplingConfig(**setting)
    assert str(error.value).startswith(sentence)


def test_built_from_plain_data():
    assert build(SamplingConfig, {"top_k": 3, "stop_tokens": [7]}, "test") == SamplingConfig(
        top_k=3, stop_tokens=(7,)
    )
