"""`gemma2 generate`: generates text with a trained run or released weights."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma2_jax.cli.chat import chat, check_turns, with_compile_message
from gemma2_jax.cli.parsers import Verbs, add_verb
from gemma2_jax.cli.prompts import read_prompts
from gemma2_jax.cli.standard_streams import as_utf8, utf8_output

if TYPE_CHECKING:
    from gemma2_jax.sampling.completion import Completion, Draw
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler

DESCRIPTION = """\
Completes prompts with a trained run or released weights, and prints tokens as they are generated.

  gemma2 generate --checkpoint runs/quickstart/distilled --prompt "Return a list of"
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "The file" --temperature 0    most likely tokens
  gemma2 generate --checkpoint runs/quickstart/teacher --prompts prompts.txt --num-samples 4 --json > samples.jsonl
  echo "The function" | gemma2 generate --checkpoint runs/quickstart/teacher --max-new-tokens 200 --top-p 0.9
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "1." --stop "2." --stop 107
  gemma2 generate --checkpoint google/gemma-2-2b-it --dtype bfloat16 --chat --prompt "Why is the sky blue?"
  gemma2 generate --checkpoint google/gemma-2-2b-it --dtype bfloat16 --interactive    a conversation

  gemma2 generate --checkpoint google/gemma-2-9b --dtype bfloat16 --quantize int4 --prompt "Why"    5.2 GB of weights
  gemma2 generate --checkpoint google/gemma-2-2b --adapter runs/lora --adapter hub/adapter --prompt "Q: "

RUN is a run folder, a Hugging Face folder or its name on the hub (extra `hub`), or DeepMind's Orbax checkpoint.
A file or the standard input holds one prompt per line, or lines of JSON: {"prompt": "text"}. With --json each
completion is a line of JSON: prompt, sample (counted from 0), completion, tokens (ids), stop_reason (`stop` for a stop
token, `length` for --max-new-tokens), and adapter if one is given. Several adapters complete the prompts in turn.
Sample k of --seed N equals the first sample of --seed N + k.
"""


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "generate", run, "complete prompts with a trained run", DESCRIPTION)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="the model; for a run folder, its newest checkpoint",
    )
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, for a RUN that comes without one")
    add(
        "--averaged",
        action="store_true",
        help="take the run's average of the weights, or each adapter's (training.ema)",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a LoRA adapter for RUN: a run folder, or PEFT's folder; may be repeated",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; may be repeated (default: the standard input)",
    )
    given.add_argument("--prompts", metavar="FILE", help="a file of prompts; - is the standard input")
    given.add_argument("--interactive", action="store_true", help=_INTERACTIVE)
    add("--chat", action="store_true", help="put each prompt into Gemma 2's chat format, as the user's turn")
    add("--json", action="store_true", help="print each completion as a line of JSON")
    add("--num-samples", type=int, default=1, metavar="N", help="completions per prompt (1)")
    add("--batch-size", type=int, default=8, metavar="N", help="completions generated at a time (8)")
    # `SamplingConfig` has the defaults of these options; it is not imported here, so that --help is fast.
    add("--max-new-tokens", type=int, metavar="N", help="maximum tokens per completion (128)")
    add("--temperature", type=float, metavar="X", help="0 takes the most likely token (1.0)")
    add("--top-k", type=int, metavar="N", help="sample only from the N most likely tokens")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="sample only from the most likely tokens that together have probability X",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT|ID",
        help="end at this text or token id, in addition to the checkpoint's own stop tokens; may be repeated",
    )
    add("--seed", type=int, metavar="N", help="the same seed draws the same text (0)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of weights and activations (float32)",
    )
    add(
        "--quantize",
        choices=("int8", "int4"),
        help="hold the matrices in this format; they are dequantised to --dtype layer by layer",
    )


_INTERACTIVE = "chat on the terminal: /reset, /quit or Ctrl-D; Ctrl-C stops a reply"
_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
# The option that sets each field of `SamplingConfig`.
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
    from gemma2_jax.formats.adapter import read_adapter
    from gemma2_jax.formats.based import check_base
    from gemma2_jax.formats.load import adapted, load_tokenizer, model_of, open_source, weight_format
    from gemma2_jax.model.config import ComputeConfig
    from gemma2_jax.model.weights import fallbacks, weight_specs
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler
    from gemma2_jax.sampling.stop_conditions import with_stops
    from gemma2_jax.screen import activity

    _check(arguments)
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    with _named_as_options():
        config = SamplingConfig(**{name: value for name, value in settings.items() if value is not None})
    prompts: list[str] = []
    if not arguments.interactive:  # refuse bad prompts before loading the checkpoint
        prompts = [as_utf8(text) for text in arguments.prompt or read_prompts(arguments.prompts)]
    with activity(f"loading {arguments.checkpoint}"):
        source = open_source(
            arguments.checkpoint, arguments.tokenizer, averaged=arguments.averaged and not arguments.adapter
        )
        tokenizer = load_tokenizer(source)  # refuse a bad tokenizer or --stop before reading the weights
        if arguments.interactive:
            check_turns(tokenizer)
        if arguments.stop or arguments.chat or arguments.interactive:
            turns = arguments.chat or arguments.interactive
            with _named_as_options():
                config = with_stops(config, tokenizer, arguments.stop, turns)
        adapters = [read_adapter(folder, source.config, arguments.averaged) for folder in arguments.adapter]
        for adapter in adapters:
            check_base(adapter.path, adapter.identity, source)
        format_ = weight_format(arguments.quantize, "--quantize")
        model = model_of(source, arguments.dtype, format_=format_)
    if format_ is not None and (others := fallbacks(weight_specs(source.config), format_)):
        print(f"{', '.join(others)} in int8: {format_.name} holds no rows of odd length", file=sys.stderr)
    compute = ComputeConfig(dtype=arguments.dtype, unroll_layers=True)
    if not adapters:
        sampler = Sampler(model, tokenizer, compute)
        del model  # the sampler keeps the weights
        _sample(sampler, prompts, config, arguments)
    for folder, adapter in zip(arguments.adapter, adapters, strict=True):
        if len(adapters) > 1 and not arguments.json:
            print(f"=== {folder}", flush=True)
        _sample(Sampler(adapted(model, adapter), tokenizer, compute), prompts, config, arguments, folder)


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Replaces the fields in messages of `SamplingConfig` by the options that set them."""
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
            "--interactive prints one reply per message, as text; leave out --json and --num-samples."
        )
    if arguments.interactive and len(arguments.adapter) > 1:
        raise UserError("--interactive chats with one model; give at most one --adapter.")


def _sample(
    sampler: "Sampler",
    prompts: Sequence[str],
    config: "SamplingConfig",
    arguments: argparse.Namespace,
    adapter: str | None = None,
) -> None:
    """Chats, or prints the completions in order, batch by batch; `adapter` is the folder of the model's adapter."""
    if arguments.interactive:
        chat(sampler, config)
        return
    from gemma2_jax.data.chat_format import render
    from gemma2_jax.sampling.completion import Draw

    inputs = prompts
    if arguments.chat:
        inputs = [render([{"role": "user", "content": prompt}], generation_prompt=True) for prompt in prompts]
    draws = [
        Draw(prompt, sample) for prompt in range(len(prompts)) for sample in range(arguments.num_samples)
    ]
    for first in range(0, len(draws), arguments.batch_size):
        batch = draws[first : first + arguments.batch_size]
        completions = sampler.complete([inputs[draw.prompt] for draw in batch], config, batch)
        if first == 0:
            completions = with_compile_message(completions)
        if arguments.json:
            _print_json(completions, prompts, batch, adapter)
        else:
            _print_text(completions, prompts, batch, arguments)


def _print_json(
    completions: Iterator[list["Completion"]],
    prompts: Sequence[str],
    batch: Sequence["Draw"],
    adapter: str | None,
) -> None:
    """Prints each completion once it and all earlier ones have ended."""
    printed = 0
    for rows in completions:
        while printed < len(batch) and rows[printed].stop_reason is not None:
            draw, row = batch[printed], rows[printed]
            record = {
                "prompt": prompts[draw.prompt],
                "sample": draw.sample,
                "completion": row.text,
                "tokens": row.tokens,
                "stop_reason": row.stop_reason,
                **({} if adapter is None else {"adapter": adapter}),
            }
            with utf8_output():
                print(json.dumps(record, ensure_ascii=False), flush=True)
            printed += 1


def _print_text(
    completions: Iterator[list["Completion"]],
    prompts: Sequence[str],
    batch: Sequence["Draw"],
    arguments: argparse.Namespace,
) -> None:
    """Streams the first row, then the next one: first its text so far, then its further text."""
    one = len(prompts) * arguments.num_samples == 1
    row, shown = 0, -1  # characters of the row printed so far; -1 before its prompt
    for rows in completions:
        while row < len(batch):
            if shown < 0:
                draw, shown = batch[row], 0
                sample = f", sample {draw.sample}" if arguments.num_samples > 1 else ""
                # In a chat, print only the reply.
                prompt = "" if arguments.chat else prompts[draw.prompt]
                print(prompt if one else f"--- {draw.prompt + 1}{sample}\n{prompt}", end="")
            print(rows[row].text[shown:], end="", flush=True)
            shown = len(rows[row].text)
            if rows[row].stop_reason is None:
                break
            print(flush=True)
            row, shown = row + 1, -1
