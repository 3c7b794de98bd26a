"""`gemma2 generate`: text from a trained run, or from released weights."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma2_jax.cli.chat import announced, chat, check_turns
from gemma2_jax.cli.parsers import Verbs, add_verb
from gemma2_jax.cli.prompts import read_prompts
from gemma2_jax.cli.streams import as_utf8, utf8_output

if TYPE_CHECKING:
    from gemma2_jax.sampling.completion import Completion, Draw
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler

DESCRIPTION = """\
Continues prompts with a trained run or released weights, token by token as they are made.

  gemma2 generate --checkpoint runs/quickstart/distilled --prompt "Return a list of"
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "The file" --temperature 0    the likeliest tokens
  gemma2 generate --checkpoint runs/quickstart/teacher --prompts prompts.txt --num-samples 4 --json > samples.jsonl
  echo "The function" | gemma2 generate --checkpoint runs/quickstart/teacher --max-new-tokens 200 --top-p 0.9
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "1." --stop "2." --stop 107
  gemma2 generate --checkpoint google/gemma-2-2b-it --dtype bfloat16 --chat --prompt "Why is the sky blue?"
  gemma2 generate --checkpoint google/gemma-2-2b-it --dtype bfloat16 --interactive    a conversation

RUN is a run folder, a Hugging Face folder or its name on the hub (extra `hub`), or DeepMind's Orbax checkpoint.
Prompts in a file or on the standard input are one a line, or lines of JSON: {"prompt": "text"}. With --json each
completion is a line of JSON: prompt, sample (counted from 0), completion, tokens (ids), and stop_reason (`stop`
for a stop token, `length` for --max-new-tokens). Sample k of --seed N is what --seed N + k gives first.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "generate", run, "continue prompts with a trained run", DESCRIPTION)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="what to continue with; of a run, its newest checkpoint",
    )
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, for a RUN that comes without one")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; standard input if left out",
    )
    given.add_argument("--prompts", metavar="FILE", help="a file of prompts; - is the standard input")
    given.add_argument("--interactive", action="store_true", help=_INTERACTIVE)
    add("--chat", action="store_true", help="put each prompt into Gemma 2's chat format, as the user's turn")
    add("--json", action="store_true", help="print each completion as a line of JSON")
    add("--num-samples", type=int, default=1, metavar="N", help="completions of each prompt (1)")
    add("--batch-size", type=int, default=8, metavar="N", help="completions that are made together (8)")
    # Their defaults are those of `SamplingConfig`, which --help does without.
    add("--max-new-tokens", type=int, metavar="N", help="stop after so many tokens (128)")
    add("--temperature", type=float, metavar="X", help="0 takes the likeliest token (1.0)")
    add("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens only")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="draw among the likeliest tokens that hold X of the probability",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT|ID",
        help="end at this text, or at the token of this id, as well as at the checkpoint's own stop tokens; may be "
        "given several times",
    )
    add("--seed", type=int, metavar="N", help="the same seed draws the same text (0)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations (float32)",
    )


_INTERACTIVE = "chat on the terminal: /reset, /quit or Ctrl-D; Ctrl-C stops a reply"
_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
# What each field of `SamplingConfig` is given by.
OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
    "stop_tokens": "--stop",
    "stop_texts": "--stop",
}


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.formats.load import load_model, load_tokenizer, open_source
    from gemma2_jax.model.config import ComputeConfig
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler
    from gemma2_jax.sampling.stop_conditions import with_stops
    from gemma2_jax.screen import activity

    _check(arguments)
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    with _named_as_options():
        config = SamplingConfig(**{name: value for name, value in settings.items() if value is not None})
    prompts: list[str] = []
    if not arguments.interactive:  # refuse bad prompts before the checkpoint is read
        prompts = [as_utf8(text) for text in arguments.prompt or read_prompts(arguments.prompts)]
    with activity(f"loading {arguments.checkpoint}"):
        source = open_source(arguments.checkpoint, arguments.tokenizer)
        tokenizer = load_tokenizer(source)  # what it refuses is told before the weights are read
        if arguments.interactive:
            check_turns(tokenizer)
        if arguments.stop or arguments.chat or arguments.interactive:
            turns = arguments.chat or arguments.interactive
            with _named_as_options():
                config = with_stops(config, tokenizer, arguments.stop, turns)
        model = load_model(source, arguments.dtype)
        sampler = Sampler(model, tokenizer, ComputeConfig(dtype=arguments.dtype, unroll_layers=True))
    del model  # the sampler has its weights
    if arguments.interactive:
        chat(sampler, config)
    else:
        _generate(sampler, prompts, config, arguments)


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Names the options that were typed, where `SamplingConfig` refuses its fields."""
    from gemma2_jax.config import UserError

    try:
        yield
    except UserError as error:
        message = str(error).replace("or null for", "or left out for")
        for name, option in OPTIONS.items():
            message = message.replace(f"sampling.{name}", option)
        raise UserError(message) from None


def _check(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError

    for option, number in (("--num-samples", arguments.num_samples), ("--batch-size", arguments.batch_size)):
        if number < 1:
            raise UserError(f"{option} is {number}; it must be at least 1.")
    if arguments.interactive and (arguments.json or arguments.num_samples > 1):
        raise UserError(
            "--interactive gives one reply to each message, as text; leave out --json and --num-samples."
        )


def _generate(
    sampler: "Sampler", prompts: Sequence[str], config: "SamplingConfig", arguments: argparse.Namespace
) -> None:
    """Prints the completions in order, a batch of them after another."""
    from gemma2_jax.data.chat import render
    from gemma2_jax.sampling.completion import Draw

    read = prompts
    if arguments.chat:
        read = [render([{"role": "user", "content": prompt}], generation_prompt=True) for prompt in prompts]
    draws = [
        Draw(prompt, sample) for prompt in range(len(prompts)) for sample in range(arguments.num_samples)
    ]
    for first in range(0, len(draws), arguments.batch_size):
        batch = draws[first : first + arguments.batch_size]
        growing = sampler.complete([read[draw.prompt] for draw in batch], config, batch)
        if first == 0:
            growing = announced(growing)
        if arguments.json:
            _print_json(growing, prompts, batch)
        else:
            _print_text(growing, prompts, batch, arguments)


def _print_json(
    growing: Iterator[list["Completion"]], prompts: Sequence[str], batch: Sequence["Draw"]
) -> None:
    """Prints each completion when it and those before it have ended."""
    printed = 0
    for rows in growing:
        while printed < len(batch) and rows[printed].stop_reason is not None:
            draw, row = batch[printed], rows[printed]
            record = {
                "prompt": prompts[draw.prompt],
                "sample": draw.sample,
                "completion": row.text,
                "tokens": row.tokens,
                "stop_reason": row.stop_reason,
            }
            with utf8_output():
                print(json.dumps(record, ensure_ascii=False), flush=True)
            printed += 1


def _print_text(
    growing: Iterator[list["Completion"]],
    prompts: Sequence[str],
    batch: Sequence["Draw"],
    arguments: argparse.Namespace,
) -> None:
    """Prints the first row as it grows, then the next: what there is of it by then, and as it grows further."""
    one = len(prompts) * arguments.num_samples == 1
    row, shown = 0, -1  # characters of the row's text; -1 before its prompt
    for rows in growing:
        while row < len(batch):
            if shown < 0:
                draw, shown = batch[row], 0
                sample = f", sample {draw.sample}" if arguments.num_samples > 1 else ""
                # In a chat, the answer stands by itself.
                prompt = "" if arguments.chat else prompts[draw.prompt]
                print(prompt if one else f"--- {draw.prompt + 1}{sample}\n{prompt}", end="")
            print(rows[row].text[shown:], end="", flush=True)
            shown = len(rows[row].text)
            if rows[row].stop_reason is None:
                break
            print(flush=True)
            row, shown = row + 1, -1
