"""Prompts in, text out: equal to sampling one token after another from the full forward pass."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.model import decoder
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sampling import generation
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler, bucket
from tests.parameters import mostly_thorough

NEVER = (900, 901)  # as many stop tokens as there are by default, so that no test compiles for fewer
GREEDY = SamplingConfig(max_new_tokens=55, temperature=0.0, stop_tokens=NEVER)
# Shorter than the window of 8 and far longer, in one batch.
PROMPTS = [[2, 40], [2, *range(30, 70)], [2, 9, 11, 13, 17, 19, 23, 29]]


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return Sampler(model, tokenizer, ComputeConfig(unroll_layers=True))


@pytest.fixture(scope="module")
def greedy(sampler):
    return sampler.generate_tokens(PROMPTS, GREEDY)


def test_greedy_tokens_are_those_of_the_full_forward(model, greedy):
    """Each continuation, read at once, is at every step what the full forward holds most likely."""
    forward = jax.jit(Gemma2.__call__)
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert len(new) == 55
        row = np.zeros((1, 96), np.int32)
        row[0, : len(prompt) + 55] = prompt + new
        logits = forward(model, row)[0, len(prompt) - 1 :]
        assert np.argmax(logits, axis=-1)[:55].tolist() == new


@mostly_thorough(
    "choice",
    [
        TokenChoice(0.0),
        TokenChoice(1.0),
        TokenChoice(100.0),
        TokenChoice(1e-3),
        TokenChoice(1.0, top_k=3),
        TokenChoice(100.0, top_k=1000),
        TokenChoice(1.0, top_p=0.5),
        TokenChoice(100.0, top_p=1.0),
    ],
    ids=str,
)
def test_padding_of_the_vocabulary_is_never_chosen(model, choice):
    """Though, unmasked, its logits are the largest."""
    tokens = jax.random.randint(jax.random.key(0), (8, 64), 0, 310)
    unmasked = Gemma2(replace(model.config, vocab_padding=0), model.params())
    keys = jax.random.split(jax.random.key(1), tokens.size)
    assert np.mean(TokenChoice(0.0)(unmasked(tokens).reshape(-1, 320), keys) >= 310) > 0.99
    assert np.max(choice(model(tokens).reshape(-1, 320), keys)) < 310


def test_padding_of_the_vocabulary_is_never_generated(sampler, greedy):
    drawn = sampler.generate_tokens(PROMPTS, replace(GREEDY, temperature=1.0))
    assert max(max(row) for row in greedy + drawn) < 310


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_a_row_samples_the_same_alone_and_in_a_batch(sampler, settings):
    config = replace(GREEDY, temperature=1.0, seed=3, **settings)
    together = sampler.generate_tokens(PROMPTS, config)
    assert sampler.generate_tokens(PROMPTS[:1], config) == together[:1]
    assert sampler.generate_tokens([PROMPTS[0], PROMPTS[2], PROMPTS[1]], config)[0] == together[0]


def test_seeds_and_rows_differ_and_repeat(sampler):
    config = replace(GREEDY, temperature=1.0)
    same = [PROMPTS[1]] * 3
    found = sampler.generate_tokens(same, config)
    assert found[0] != found[1] != found[2]
    assert sampler.generate_tokens(same, config) == found
    assert sampler.generate_tokens(same, replace(config, seed=1))[0] != found[0]


def test_top_k_of_one_is_greedy(sampler, greedy):
    assert sampler.generate_tokens(PROMPTS, replace(GREEDY, temperature=0.7, top_k=1)) == greedy


def test_a_row_ends_at_its_stop_token_and_others_go_on(sampler, greedy):
    stop = next(token for token in greedy[0] if token not in greedy[1] + greedy[2])
    found = sampler.generate_tokens(PROMPTS, replace(GREEDY, stop_tokens=(stop, 900)))
    assert found[0] == greedy[0][: greedy[0].index(stop) + 1]
    assert found[1:] == greedy[1:]


def test_rows_end_at_texts(sampler, tokenizer, greedy, monkeypatch):
    """Each row ends at its own position; when all have ended, no more tokens are sampled."""
    monkeypatch.setattr(tokenizer, "encode", lambda prompt, **_: PROMPTS[int(prompt)])
    whole = sampler.generate(["0", "1", "2"], GREEDY)
    stop = whole[0][3:5]
    config = replace(GREEDY, stop_texts=(stop, "never said"))
    expected = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert sampler.generate(["0", "1", "2"], config) == expected
    asked = []
    stream_tokens = sampler.stream_tokens

    def counted(*arguments):
        for new in stream_tokens(*arguments):
            asked.append(len(new[0]))
            yield new

    monkeypatch.setattr(sampler, "stream_tokens", counted)
    assert sampler.generate(["0"], config) == expected[:1]
    assert sum(asked) < 55


def test_it_stops_when_all_rows_have(sampler, greedy, monkeypatch):
    """And no token is computed after the dispatch that ended the last row."""
    calls = []
    monkeypatch.setattr(generation, "_advance", lambda *args, **kwargs: calls.append(args))
    stop = greedy[0][0]
    assert sampler.generate_tokens(PROMPTS[:1], replace(GREEDY, stop_tokens=(stop, 900))) == [[stop]]
    assert calls == []


@pytest.mark.parametrize("new", [1, 30])
def test_the_requested_number_of_tokens(sampler, greedy, new):
    found = sampler.generate_tokens(PROMPTS, replace(GREEDY, max_new_tokens=new))
    assert found == [row[:new] for row in greedy]


def test_text_is_streamed_during_generation(sampler, tokenizer):
    config = replace(GREEDY, temperature=1.0, stop_tokens=None)
    prompts = ["the model", "é"]
    texts = sampler.generate(prompts, config)
    assert "".join(sampler.stream(prompts[0], config)) == texts[0]
    pieces = list(sampler.stream_batch(prompts, config))
    assert len(pieces) > 3
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts
    ids = sampler.generate_tokens([tokenizer.encode(prompt, bos=True) for prompt in prompts], config)
    assert [tokenizer.decode(row) for row in ids] == texts


@pytest.mark.parametrize("name", ["eos_id", "end_of_turn_id"])
def test_by_default_text_ends_where_document_or_turn_do(model, tokenizer, sampler, greedy, name, monkeypatch):
    """The stop token, here one that the model generates anyway, is not part of the text."""
    stop = next(token for token in greedy[0] if token not in greedy[1] + greedy[2])
    monkeypatch.setattr(type(tokenizer), name, stop)
    monkeypatch.setattr(tokenizer, "encode", lambda prompt, **_: PROMPTS[int(prompt)])
    texts = sampler.generate(["0", "1", "2"], replace(GREEDY, stop_tokens=None))
    assert texts[0] == tokenizer.decode(greedy[0][: greedy[0].index(stop)])
    assert texts[1:] == [tokenizer.decode(row) for row in greedy[1:]]


def test_turns_in_a_prompt_are_control_tokens(sampler, tokenizer, monkeypatch):
    asked = []

    def stream_tokens(prompts, config):
        asked.extend(prompts)
        return iter(())

    monkeypatch.setattr(sampler, "stream_tokens", stream_tokens)
    sampler.generate(["<start_of_turn>user\n"], GREEDY)
    assert asked[0][:2] == [tokenizer.bos_id, tokenizer.encode("<start_of_turn>", control=True)[0]]


def test_no_prompts(sampler):
    assert sampler.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([[2], []], "Prompt 1 has no tokens"),
        ([[2, 310]], "Prompt 0 holds a token id that the model does not have; accepted: ids 0 to 309"),
    ],
)
def test_prompts_that_cannot_be_read(sampler, prompts, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        sampler.generate_tokens(prompts, GREEDY)


def test_a_single_text_is_not_a_list_of_prompts(sampler):
    with pytest.raises(UserError) as error:
        sampler.generate("ab", GREEDY)
    assert str(error.value) == "prompts is the text 'ab'; it must be a list of texts, as in ['ab']."


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_nan_is_reported(model, tokenizer, temperature):
    params = jax.tree.map(lambda weight: weight * np.float32("nan"), model.params())
    broken = Sampler(Gemma2(model.config, params), tokenizer)
    with pytest.raises(UserError, match=r"^The model's logits are NaN"):
        broken.generate_tokens(PROMPTS[:1], replace(GREEDY, temperature=temperature))


@pytest.mark.parametrize("padding", [0, 9, 11])
def test_a_foreign_tokenizer_is_refused(model, tokenizer, padding):
    other = Gemma2(replace(model.config, vocab_padding=padding), model.params())
    with pytest.raises(UserError, match=f"^The tokenizer has 310 tokens and the model {320 - padding}; "):
        Sampler(other, tokenizer)


def test_few_sizes_to_compile_for():
    sizes = {bucket(length) for length in range(1, 8193)}
    assert sizes == {
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4096,
        6144,
        8192,
    }
    assert all(length <= bucket(length) <= max(16, length * 1.5) for length in range(1, 8193))


@pytest.mark.thorough
def test_prompts_of_a_session_share_compiled_programs(model, tokenizer, monkeypatch):
    """Prompts of 33 to 48 tokens, in two or three chunks, compile nothing after the first; one of 49 does."""
    monkeypatch.setattr(decoder, "CHUNK", 20)
    sampler = Sampler(model, tokenizer)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def compilations(length, seed):
        compiled.clear()
        sampler.generate_tokens([[2, *range(30, 29 + length)]], replace(GREEDY, max_new_tokens=12, seed=seed))
        return len(compiled)

    assert compilations(41, 0) > 0
    assert [compilations(length, seed) for seed, length in enumerate((33, 48, 40))] == [0, 0, 0]
    assert compilations(49, 0) > 0
