"""`gemma2 generate`: text from a trained run, or from released weights."""

import argparse
import sys

from gemma2_jax.cli.parsers import Verbs, add_verb

DESCRIPTION = """\
Continues prompts with a trained run or released weights, token by token as they are made. With several prompts
all of them are continued together, and printed when they are done.

  gemma2 generate --checkpoint runs/quickstart/distilled --prompt "Return a list of"
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "The file" --temperature 0    the likeliest tokens
  echo "The function" | gemma2 generate --checkpoint runs/quickstart/teacher --max-new-tokens 200 --top-p 0.9
  gemma2 generate --checkpoint runs/quickstart/teacher --prompt "1." --stop "2." --stop 107
  gemma2 generate --checkpoint google/gemma-2-2b-it --dtype bfloat16 --chat --prompt "Why is the sky blue?"

RUN is a run folder, a Hugging Face folder or its name on the hub (extra `hub`), or DeepMind's Orbax checkpoint.
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
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; standard input if left out",
    )
    add("--chat", action="store_true", help="put each prompt into Gemma 2's chat format, as the user's turn")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after so many tokens (128)")
    add("--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest token (0.7)")
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
        help="end at this text, or at the token of this id, as well as where the checkpoint says; may be given several "
        "times",
    )
    add("--seed", type=int, default=0, metavar="N", help="the same seed draws the same text (0)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations (float32)",
    )


def run(arguments: argparse.Namespace) -> None:
    from gemma2_jax.data.chat import render
    from gemma2_jax.formats.load import load
    from gemma2_jax.model.config import ComputeConfig
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler
    from gemma2_jax.sampling.stops import with_stops

    config = SamplingConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    model, tokenizer = load(arguments.checkpoint, arguments.dtype)
    if arguments.stop or arguments.chat:
        config = with_stops(config, tokenizer, arguments.stop, arguments.chat)
    sampler = Sampler(model, tokenizer, ComputeConfig(dtype=arguments.dtype, unroll_layers=True))
    prompts = arguments.prompt or [_from_standard_input()]
    # What is shown before the continuation: in a chat, the answer stands by itself.
    shown = ["" if arguments.chat else prompt for prompt in prompts]
    if arguments.chat:
        prompts = [
            render([{"role": "user", "content": prompt}], generation_prompt=True) for prompt in prompts
        ]
    if len(prompts) == 1:
        print(shown[0], end="", flush=True)
        for piece in sampler.stream(prompts[0], config):
            print(piece, end="", flush=True)
        print()
    else:
        for number, (prompt, text) in enumerate(
            zip(shown, sampler.generate(prompts, config), strict=True), 1
        ):
            print(f"--- {number}\n{prompt}{text}")


def _from_standard_input() -> str:
    from gemma2_jax.config import UserError

    if sys.stdin.isatty():
        raise UserError("there is no prompt; accepted: --prompt TEXT, or text on the standard input.")
    return sys.stdin.read().removesuffix("\n")
