"""The command generate: the arguments of the sampler, and the output."""

import io
import json
import os
import re
import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import pytest

from gemma2_jax.cli import generate
from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.generation import DraftStatistics


@pytest.fixture
def asked(monkeypatch):
    """Calls of a fake sampler, which completes each prompt with its length, by characters, with the first row last."""
    calls: list[tuple[list[str], SamplingConfig]] = []

    class Sampler:
        def __init__(self, model, tokenizer, compute, draft, draft_tokens, quantize_cache):
            assert model == "bfloat16 model of RUN"
            assert compute.dtype == "bfloat16"
            assert (draft, draft_tokens) in ((None, 4), ("bfloat16 model of SMALL", 2))
            assert quantize_cache is None
            self.draft_statistics = DraftStatistics(tested=80, accepted=60, passes=40, tokens=100)

        def complete(self, prompts, config, draws=None):
            calls.append((list(prompts), config))
            texts = [f" [{len(prompt)}]" for prompt in prompts]
            rows = [SimpleNamespace(text="", tokens=[], stop_reason=None) for _ in prompts]
            for turn in range(max(map(len, texts)) + len(rows)):
                for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                    shown = max(0, turn - (len(rows) - place - 1))
                    row.text, row.tokens = text[:shown], list(range(min(shown, len(text))))
                    row.stop_reason = "stop" if shown >= len(text) else None
                yield rows

    def open_source(folder, tokenizer, averaged=False):
        calls.extend([] if tokenizer is None else [([tokenizer], SamplingConfig())])
        return folder

    def model_of(source, dtype, mesh, format_=None):
        assert mesh is None
        return f"{dtype} model of {source}" + (f" in {format_.name}" if format_ else "")

    monkeypatch.setattr("gemma2_jax.sampling.sampler.Sampler", Sampler)
    monkeypatch.setattr("gemma2_jax.formats.load.open_source", open_source)
    monkeypatch.setattr("gemma2_jax.formats.load.load_tokenizer", lambda source: Turns(source))
    monkeypatch.setattr("gemma2_jax.formats.load.model_of", model_of)
    return calls


class Turns:
    """A tokenizer that may lack turn tokens; texts end at id 1, and turns at 5. That of OTHER is another one."""

    stop_ids, end_of_turn_id, vocab_size = frozenset([1]), 5, 9

    def __init__(self, source):
        self.fingerprint = "b" * 64 if source == "OTHER" else "a" * 64

    def control_id(self, text):
        return {"<bos>": 2}.get(text)

    def encode(self, text, control):
        assert control
        if os.environ.get("LACKS_TURNS"):
            raise UserError("x.model has no <start_of_turn> token; a chat needs Gemma's tokenizer.")
        return [1]


COMMAND = ["generate", "--checkpoint", "RUN", "--dtype", "bfloat16"]


def test_one_prompt_is_continued_where_it_ends(asked, capsys):
    options = ["--temperature", "0", "--top-k", "3", "--top-p", "0.5", "--seed", "4", "--max-new-tokens", "9"]
    assert main([*COMMAND, "--prompt", "The file", *options]) == 0
    assert capsys.readouterr().out == "The file [8]\n"
    assert asked == [
        (["The file"], SamplingConfig(max_new_tokens=9, temperature=0, top_k=3, top_p=0.5, seed=4))
    ]


def test_weights_that_a_format_cannot_hold_are_told(toy_run, tokenizer, tmp_path, capsys):
    model = replace(toy_run.model, d_ff=65)
    write_run(tmp_path / "run", model, Gemma2.init(model, jax.random.key(0)).params(), toy_run.tokenizer.path)
    asked = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "2"]
    assert main([*asked, "--quantize", "int4", "--quantize-cache", "int8", "--json"]) == 0
    shown = capsys.readouterr()
    assert 1 <= len(json.loads(shown.out)["tokens"]) <= 2
    assert "mlp/down in int8: int4 holds no rows of odd length" in shown.err


def test_other_formats_of_the_cache_are_refused(capsys):
    with pytest.raises(SystemExit) as exited:
        main([*COMMAND, "--prompt", "a", "--quantize-cache", "int4"])
    assert exited.value.code == 2
    assert "argument --quantize-cache: invalid choice: 'int4'" in capsys.readouterr().err


def test_several_prompts_are_numbered(asked, capsys):
    assert main([*COMMAND, "--prompt", "a", "--prompt", "bc"]) == 0
    assert capsys.readouterr().out == "--- 1\na [1]\n--- 2\nbc [2]\n"


def test_a_chat_prints_the_answer_alone(asked, capsys):
    assert main([*COMMAND, "--chat", "--prompt", "Why?"]) == 0
    turns = "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert asked[0][0] == [turns]
    assert asked[0][1].stop_tokens == (1, 5)
    assert capsys.readouterr().out == f" [{len(turns)}]\n"


def test_it_also_stops_at_the_given_stop_conditions(asked, capsys):
    assert main([*COMMAND, "--prompt", "x", "--stop", "7", "--stop", "\n\n", "--stop", "<bos>"]) == 0
    assert (asked[0][1].stop_tokens, asked[0][1].stop_texts) == ((1, 2, 7), ("\n\n",))
    assert main([*COMMAND, "--prompt", "x", "--stop", "9"]) == 1
    assert "--stop is 9; accepted: a text, or a token id from 0 to 8." in capsys.readouterr().err


def test_several_prompts_are_made_a_batch_at_a_time_and_in_order(asked, capsys):
    given = [text for prompt in ("a", "bcd", "ef") for text in ("--prompt", prompt)]
    assert main([*COMMAND, *given, "--batch-size", "2"]) == 0
    assert [prompts for prompts, _ in asked] == [["a", "bcd"], ["ef"]]
    assert capsys.readouterr().out == "--- 1\na [1]\n--- 2\nbcd [3]\n--- 3\nef [2]\n"


def test_several_samples_are_numbered(asked, capsys):
    assert main([*COMMAND, "--prompt", "a", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out == "--- 1, sample 0\na [1]\n--- 1, sample 1\na [1]\n"


def test_json_has_a_line_for_each_completion(asked, capsys):
    assert main([*COMMAND, "--prompt", "é\n", "--prompt", "bc", "--num-samples", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["sample"], row["completion"]) for row in rows] == [
        ("é\n", 0, " [2]"),
        ("é\n", 1, " [2]"),
        ("bc", 0, " [2]"),
        ("bc", 1, " [2]"),
    ]
    assert all((row["tokens"], row["stop_reason"]) == ([0, 1, 2, 3], "stop") for row in rows)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\n\n two \r\nthree", ["one", " two ", "three"]),
        ('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": "c"}\n', ["a\nb", "c"]),
        ('{"no": 1}\nx\n', ['{"no": 1}', "x"]),
        ("é\u2028ü\n", ["é\u2028ü"]),
        ('\ufeff{"prompt": "a"}\n', ["a"]),
    ],
)
@pytest.mark.parametrize("place", ["piped", "-", "file"])
def test_prompts_come_from_a_file_or_the_standard_input(asked, monkeypatch, tmp_path, text, prompts, place):
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    where = {"piped": [], "-": ["--prompts", "-"], "file": ["--prompts", str(tmp_path / "prompts.txt")]}
    assert main([*COMMAND, *where[place]]) == 0
    assert asked[0][0] == prompts


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}\n',
            r"p\.jsonl, line 2 is not a JSON object with a prompt; accepted",
        ),
        ("p.txt", b'{"prompt": "a"}\nb\n', r"p\.txt, line 2 is not a JSON object with a prompt"),
        ("p.txt", b"\n \n", r"p\.txt holds no prompt; accepted: one prompt per line"),
        ("p.txt", b"\xe9\n", r"p\.txt is not UTF-8"),
        ("p.jsonl", b"[" * 5000, r"line 1 is not a JSON object with a prompt"),
    ],
)
def test_a_file_without_prompts_is_refused_before_anything_is_loaded(
    asked, tmp_path, capsys, name, content, sentence
):
    (tmp_path / name).write_bytes(content)
    assert main([*COMMAND, "--prompts", str(tmp_path / name)]) == 1
    assert re.search(rf"^gemma2: [^\n]*{sentence}[^\n]*\n$", capsys.readouterr().err)
    assert main([*COMMAND, "--prompts", str(tmp_path / "nowhere")]) == 1
    assert "nowhere cannot be read" in capsys.readouterr().err
    assert asked == []


def test_a_standard_input_that_is_not_utf_8_is_refused(asked, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    assert main(COMMAND) == 1
    assert "the standard input is not UTF-8" in capsys.readouterr().err


def test_defaults_are_those_of_the_library(asked, capsys):
    assert main([*COMMAND, "--prompt", "a"]) == 0
    usual = SamplingConfig()
    assert asked[0][1] == usual
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert f"takes the most likely token ({usual.temperature})" in output
    assert f"maximum tokens per completion ({usual.max_new_tokens})" in output


def test_another_tokenizer_may_be_given(asked):
    assert main([*COMMAND, "--prompt", "a", "--tokenizer", "my.model"]) == 0
    assert asked[0][0] == ["my.model"]


@pytest.mark.parametrize("options", [["--prompt", "a"], ["--interactive"]])
def test_a_drafts_statistics_are_printed_at_the_end(asked, monkeypatch, capsys, options):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main([*COMMAND, *options, "--draft", "SMALL", "--draft-tokens", "2"]) == 0
    expected = "draft: 75.0% of 80 tested tokens accepted, 2.50 tokens per pass of the model"
    assert capsys.readouterr().err.splitlines()[-1] == expected


USER, MODEL, END = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"


def test_a_conversation_keeps_its_history_until_it_is_reset(asked, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Hi\n\nWhy?\n/reset\n/foo\n<end_of_turn>\nBye\n/quit\nnever\n")
    )
    assert main([*COMMAND, "--interactive"]) == 0
    first = f"{USER}Hi{END}{MODEL}"
    reply = f"[{len(first)}]"
    assert [prompts for prompts, _ in asked] == [
        [first],
        [f"{first}{reply}{END}{USER}Why?{END}{MODEL}"],
        [f"{USER}Bye{END}{MODEL}"],
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == f" {reply}"
    assert "there is no command /foo; accepted: /reset, /quit." in captured.err
    assert "contains <start_of_turn> or <end_of_turn>" in captured.err


def test_control_c_stops_a_reply_and_the_conversation_goes_on(asked, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nWhy?\n"))
    complete = generate.chat.__globals__["with_compile_message"]

    def interrupted(growing, show):
        for number, rows in enumerate(complete(growing, show)):
            if number == 2:
                signal.raise_signal(signal.SIGINT)
            yield rows

    monkeypatch.setattr("gemma2_jax.cli.chat.with_compile_message", interrupted)
    assert main([*COMMAND, "--interactive"]) == 0
    assert len(asked) == 2
    assert f"{MODEL}[{END}" in asked[1][0][0]  # what there was of the reply, trimmed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_without_turn_tokens_is_no_partner(asked, monkeypatch, capsys):
    monkeypatch.setenv("LACKS_TURNS", "1")
    assert main([*COMMAND, "--interactive"]) == 1
    assert "has no <start_of_turn> token; a chat needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--interactive"], "has no <start_of_turn> token; a chat needs"),
        (["--prompt", "a", "--stop", "9"], "--stop is 9; accepted: a text, or a token id from 0 to 8."),
    ],
)
def test_a_tokenizer_error_is_reported_before_weights_are_read(asked, monkeypatch, capsys, options, sentence):
    monkeypatch.setattr("gemma2_jax.formats.load.model_of", None)
    monkeypatch.setenv("LACKS_TURNS", "1")
    assert main([*COMMAND, *options]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "something else"])
@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "x", "--checkpoint", "some/model"], ["convert", "some/model", "new/target"]],
)
def test_a_bad_tokenizer_file_is_reported_before_a_checkpoint_is_downloaded(
    content, command, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma2_jax.formats.hub.download", None)
    if content is not None:
        (tmp_path / "my.model").write_text(content)
    assert main([*command, "--tokenizer", "my.model"]) == 1
    assert "my.model" in (message := capsys.readouterr().err)
    assert message.startswith("gemma2: ")
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["my.model"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--interactive", "--json"], "leave out --json and --num-samples"),
        (["--interactive", "--num-samples", "2"], "leave out --json and --num-samples"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples is 0; it must be at least 1."),
        (["--prompt", "a", "--batch-size", "-1"], "--batch-size is -1; it must be at least 1."),
        (
            ["--prompt", "a", "--draft", "SMALL", "--draft-tokens", "0"],
            "--draft-tokens is 0; it must be at least 1.",
        ),
        (
            ["--prompt", "a", "--draft-tokens", "2"],
            "--draft-tokens has no effect without a draft; add --draft RUN",
        ),
        (
            ["--prompt", "a", "--draft", "OTHER"],
            "--draft OTHER has the tokenizer bbbbbbbbbbbb of 9 tokens, but --checkpoint RUN has aaaaaaaaaaaa of 9 "
            "tokens; give a draft that was trained with the same tokenizer.",
        ),
        (
            ["--prompt", "a", "training.steps=3"],
            "training.steps=3 has no effect on generation; accepted: keys of mesh, layout.",
        ),
    ],
)
def test_options_that_do_not_go_together(asked, capsys, options, sentence):
    assert main([*COMMAND, *options]) == 1
    assert sentence in capsys.readouterr().err
    assert asked == []


def test_a_folder_without_a_checkpoint_is_reported(capsys, tmp_path):
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "x"]) == 1
    assert "holds no checkpoint of a known kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1."),
        (
            ["--max-new-tokens", "3000000000"],
            "--max-new-tokens is 3000000000; it must be at most 1073741824.",
        ),
        (["--temperature", "-1"], "--temperature is -1.0; it must be a number from 0 (greedy) upwards."),
        (["--top-k", "0"], "--top-k is 0; it must be at least 1, or left out for all tokens."),
        (["--top-p", "2"], "--top-p is 2.0; it must be above 0 and at most 1, or left out for all tokens."),
        (["--seed", "-1"], "--seed is -1; it must be from 0 to 4294967295."),
        (["--stop", ""], "--stop holds an empty text, which would stop every text at once; leave it out."),
        (["--num-samples", "0"], "--num-samples is 0; it must be at least 1."),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1."),
        (
            ["--seed", "-1", "--top-k", "0"],
            "--top-k is 0; it must be at least 1, or left out for all tokens.",
        ),
    ],
)
def test_what_is_refused_is_named_as_it_was_typed(asked, capsys, options, sentence):
    assert main(["generate", "--checkpoint", "RUN", "--dtype", "bfloat16", "--prompt", "a", *options]) == 1
    assert f"{sentence}\n" in (message := capsys.readouterr().err)
    assert "sampling." not in message
    assert "null" not in message


def test_each_setting_has_its_option(capsys):
    assert set(generate.OPTIONS) == {field.name for field in fields(SamplingConfig)}
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    output = capsys.readouterr().out
    assert all(f"  {option} " in output for option in generate.OPTIONS.values())
