"""The verb generate: what is handed to the sampler, and what is printed."""

import io
from types import SimpleNamespace

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.sampling.config import SamplingConfig


@pytest.fixture
def asked(monkeypatch):
    """What the sampler was asked; it answers each prompt with its length."""
    calls: list[tuple[list[str], SamplingConfig]] = []

    class Sampler:
        def __init__(self, model, tokenizer, compute):
            assert (model, tokenizer) == ("bfloat16 model of RUN", TOKENIZER)
            assert compute.dtype == "bfloat16"

        def generate(self, prompts, config):
            calls.append((list(prompts), config))
            return [f" [{len(prompt)}]" for prompt in prompts]

        def stream(self, prompt, config):
            yield from self.generate([prompt], config)[0]

    monkeypatch.setattr("gemma2_jax.sampling.sampler.Sampler", Sampler)
    monkeypatch.setattr(
        "gemma2_jax.formats.load.load",
        lambda folder, dtype: (f"{dtype} model of {folder}", TOKENIZER),
    )
    return calls


# Of a model whose texts end at id 1, and turns at 5.
TOKENIZER = SimpleNamespace(
    stop_ids=frozenset([1]), end_of_turn_id=5, vocab_size=9, control_id=lambda text: {"<bos>": 2}.get(text)
)


COMMAND = ["generate", "--checkpoint", "RUN", "--dtype", "bfloat16"]


def test_one_prompt_is_continued_where_it_ends(asked, capsys):
    options = ["--temperature", "0", "--top-k", "3", "--top-p", "0.5", "--seed", "4", "--max-new-tokens", "9"]
    assert main([*COMMAND, "--prompt", "The file", *options]) == 0
    assert capsys.readouterr().out == "The file [8]\n"
    assert asked == [
        (["The file"], SamplingConfig(max_new_tokens=9, temperature=0, top_k=3, top_p=0.5, seed=4))
    ]


def test_several_prompts_are_numbered(asked, capsys):
    assert main([*COMMAND, "--prompt", "a", "--prompt", "bc"]) == 0
    assert capsys.readouterr().out == "--- 1\na [1]\n--- 2\nbc [2]\n"


def test_a_chat_prints_the_answer_alone(asked, capsys):
    assert main([*COMMAND, "--chat", "--prompt", "Why?"]) == 0
    turns = "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert asked[0][0] == [turns]
    assert asked[0][1].stop_tokens == (1, 5)
    assert capsys.readouterr().out == f" [{len(turns)}]\n"


def test_it_stops_where_it_is_told_to_as_well(asked, capsys):
    assert main([*COMMAND, "--prompt", "x", "--stop", "7", "--stop", "\n\n", "--stop", "<bos>"]) == 0
    assert (asked[0][1].stop_tokens, asked[0][1].stop_texts) == ((1, 2, 7), ("\n\n",))
    assert main([*COMMAND, "--prompt", "x", "--stop", "9"]) == 1
    assert "--stop is 9; accepted: a text, or a token id from 0 to 8." in capsys.readouterr().err


def test_the_prompt_may_be_piped(asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert main(COMMAND) == 0
    assert asked[0][0] == ["two\nlines"]


def test_a_setting_that_makes_no_sense_is_told(asked, capsys):
    assert main([*COMMAND, "--prompt", "x", "--top-p", "1.5"]) == 1
    assert "top_p is 1.5; it must be above 0 and at most 1" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_told(capsys, tmp_path):
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "x"]) == 1
    assert "holds no checkpoint that is known" in capsys.readouterr().err
