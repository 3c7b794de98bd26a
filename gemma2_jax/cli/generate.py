"""`gemma2 generate`: generates text with a trained run or released weights."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.chat import chat, check_turns, with_compile_message
from gemma2_jax.cli.parsers import Verbs, add_overrides, add_verb
from gemma2_jax.cli.prompts import read_prompts
from gemma2_jax.cli.standard_streams import as_utf8, utf8_output

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gemma2_jax.data.tokenizer import Tokenizer
    from gemma2_jax.formats.source import WeightSource
    from gemma2_jax.run import RunConfig
    from gemma2_jax.sampling.completion import Completion, Draw
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.generation import DraftStatistics
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
  gemma2 generate --checkpoint runs/quickstart/teacher --draft runs/quickstart/distilled --prompt "The file"
  gemma2 generate --checkpoint google/gemma-2-9b --dtype bfloat16 --quantize int4 --prompt "Why"    5.2 GB of weights
  gemma2 generate --checkpoint google/gemma-2-2b --adapter runs/lora --adapter hub/adapter --prompt "Q: "

RUN is a run folder, a Hugging Face folder or its name on the hub (extra `hub`), DeepMind's Orbax checkpoint, or a GGUF
file.
A file of prompts, or the standard input, holds one prompt per line, or lines of JSON: {"prompt": "text"}. With --json,
each completion is a line of JSON: prompt, sample (counted from 0), completion, tokens (ids), stop_reason (`stop` for a
stop token or text, `length` for --max-new-tokens), and adapter if one is given. With several adapters, each completes
all prompts in turn. Sample k of --seed N equals the first sample of --seed N + k.

A draft is a smaller model with the same tokenizer: it proposes tokens, which RUN verifies several at a time. The
samples have RUN's own distribution, and greedy tokens are RUN's own. At the end, the command prints to standard error
the fraction of proposed tokens that were accepted, and the mean number of tokens per forward pass of RUN.
"""
EPILOG = """\
keys: mesh and layout, as in gemma2 train; without any, generation takes one device.
"""
_SECTIONS = ("mesh", "layout")


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "generate", run, "complete prompts with a trained run", DESCRIPTION, EPILOG)
    add_overrides(parser)
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
    add("--draft", metavar="RUN", help="a smaller model with the same tokenizer, for speculative decoding")
    add("--draft-tokens", type=int, metavar="N", help="tokens that the draft proposes at a time (4)")
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
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="divides the logits; 0 takes the most likely token (1.0)",
    )
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
    add("--quantize-cache", choices=("int8",), help="hold keys and values in this format (--dtype)")


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
    composed = None
    if arguments.overrides:
        from gemma2_jax.cli.sections import compose_sections

        composed = compose_sections(arguments.overrides, arguments.config_dir, "generation", _SECTIONS)
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    with _named_as_options():
        config = SamplingConfig(**{name: value for name, value in given.items() if value is not None})
    prompts: list[str] = []
    if not arguments.interactive:  # refuse bad prompts before loading the checkpoint
        prompts = [as_utf8(text) for text in arguments.prompt or read_prompts(arguments.prompts)]
    with activity(f"opening {arguments.checkpoint}"):
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
        draft_source = _open_draft(arguments, tokenizer)
        format_ = weight_format(arguments.quantize, "--quantize")
    with _on_devices(composed, source, draft_source) as mesh:
        with activity(f"loading {arguments.checkpoint}"):
            model = model_of(source, arguments.dtype, mesh, format_=format_)
            draft = None if draft_source is None else model_of(draft_source, arguments.dtype, mesh)
        if format_ is not None and (others := fallbacks(weight_specs(source.config), format_)):
            print(f"{', '.join(others)} in int8: {format_.name} holds no rows of odd length", file=sys.stderr)
        settings: dict[str, Any] = {
            "compute": ComputeConfig(dtype=arguments.dtype, unroll_layers=True),
            "draft": draft,
            "draft_tokens": arguments.draft_tokens or 4,
            "quantize_cache": arguments.quantize_cache,
        }
        if not adapters:
            sampler = Sampler(model, tokenizer, **settings)
            del model  # the sampler keeps the weights
            _sample(sampler, prompts, config, arguments)
        for folder, adapter in zip(arguments.adapter, adapters, strict=True):
            if len(adapters) > 1 and not arguments.json:
                print(f"=== {folder}", flush=True)
            sampler = Sampler(adapted(model, adapter, mesh), tokenizer, **settings)
            _sample(sampler, prompts, config, arguments, folder)


def _open_draft(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> "WeightSource | None":
    """Opens the draft, if one is given. Raises UserError if it has another tokenizer than the model."""
    from gemma2_jax.config import UserError
    from gemma2_jax.formats.load import load_tokenizer, open_source

    if arguments.draft is None:
        return None
    source = open_source(arguments.draft, arguments.tokenizer)
    found = load_tokenizer(source)
    if found.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--draft {arguments.draft} has the tokenizer {found.fingerprint[:12]} of {found.vocab_size} tokens, but "
            f"--checkpoint {arguments.checkpoint} has {tokenizer.fingerprint[:12]} of {tokenizer.vocab_size} tokens; "
            "give a draft that was trained with the same tokenizer."
        )
    return source


@contextmanager
def _on_devices(composed: "RunConfig | None", *sources: "WeightSource | None") -> Iterator["Mesh | None"]:
    """Applies the mesh and the layout of key=value to the block; yields the mesh, None for one device.

    Raises:
        UserError: the mesh has another number of devices, or does not divide the models of `sources`.
    """
    import jax

    from gemma2_jax.model.weights import dim_sizes
    from gemma2_jax.sharding.layout import check_activations, laid_out
    from gemma2_jax.sharding.mesh import build_mesh

    if composed is None:
        yield None
        return
    mesh = build_mesh(composed.mesh)
    with jax.set_mesh(mesh), laid_out(composed.layout):
        for source in sources:
            if source is not None:
                check_activations(mesh, dim_sizes(source.config))
        yield mesh


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
    if arguments.draft_tokens is not None and arguments.draft_tokens < 1:
        raise UserError(f"--draft-tokens is {arguments.draft_tokens}; it must be at least 1.")
    if arguments.draft_tokens is not None and arguments.draft is None:
        raise UserError("--draft-tokens has no effect without a draft; add --draft RUN, or leave it out.")
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
    """Chats, or prints the completions in order; then what became of the draft's tokens, if there is a draft.

    Args:
        adapter: the folder of the model's adapter.
    """
    if arguments.interactive:
        chat(sampler, config)
    else:
        _complete(sampler, prompts, config, arguments, adapter)
    if arguments.draft is not None:
        _print_draft_statistics(sampler.draft_statistics)


def _complete(
    sampler: "Sampler",
    prompts: Sequence[str],
    config: "SamplingConfig",
    arguments: argparse.Namespace,
    adapter: str | None,
) -> None:
    """Prints the completions in order, batch by batch."""
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


def _print_draft_statistics(found: "DraftStatistics") -> None:
    if found.acceptance is not None and found.tokens_per_pass is not None:
        print(
            f"draft: {found.acceptance:.1%} of {found.tested} tested tokens accepted, "
            f"{found.tokens_per_pass:.2f} tokens per pass of the model",
            file=sys.stderr,
        )


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
