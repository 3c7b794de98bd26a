"""Sizes that make no model are refused in one sentence that names the key."""

from dataclasses import replace

import pytest

from gemma2_jax.config import UserError


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 3}, "model.num_layers is 3; it must be even"),
        ({"num_heads": 5}, r"model.num_heads is 5; it must be a multiple of model.num_kv_heads \(2\)"),
        ({"head_dim": 7}, "model.head_dim is 7; it must be even"),
        ({"sliding_window": 0}, "model.sliding_window is 0; it must be at least 1, or null"),
        (
            {"global_every": 3},
            r"model.global_every is 3; it must be a divisor of the number of pairs of layers \(2\)",
        ),
        ({"global_every": 0}, "model.global_every is 0; it must be a divisor"),
        ({"global_every": 2, "sliding_window": None}, "model.global_every is 2, but model.sliding_window is"),
        (
            {"vocab_padding": -1},
            "model.vocab_padding is -1; it must be at least 0 and below model.vocab_size",
        ),
        ({"vocab_padding": 97}, r"model.vocab_padding is 97; .* below model.vocab_size \(97\)"),
        ({"d_ff": 0}, "model.d_ff is 0; it must be at least 1"),
        ({"final_logit_softcap": 0.0}, "model.final_logit_softcap is 0.0; it must be above 0"),
        ({"query_pre_attn_scalar": float("nan")}, "model.query_pre_attn_scalar is nan; it must be above 0"),
    ],
)
def test_refused(toy_config, change, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        replace(toy_config, **change)


def test_derived_sizes(toy_config):
    assert toy_config.num_pairs == 2
    assert toy_config.query_scale == 8**-0.5
    assert (toy_config.num_tokens, replace(toy_config, vocab_padding=7).num_tokens) == (97, 90)
