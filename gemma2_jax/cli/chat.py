"""`gemma2 generate --interactive`: a conversation on the terminal."""

import contextlib
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma2_jax import stops

if TYPE_CHECKING:
    from gemma2_jax.data.tokenizer import Tokenizer
    from gemma2_jax.sampling.completion import Completion
    from gemma2_jax.sampling.config import SamplingConfig
    from gemma2_jax.sampling.sampler import Sampler

HINT = "/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops a reply"

Message = Mapping[str, object]


def check_turns(tokenizer: "Tokenizer") -> None:
    """Raises UserError if the tokenizer lacks the turn tokens, which a chat needs."""
    from gemma2_jax.data.chat_format import render

    tokenizer.encode(render([{"role": "user", "content": "x"}], generation_prompt=True), control=True)


def chat(sampler: "Sampler", config: "SamplingConfig") -> None:
    """Alternates between reading a message and streaming the reply; each prompt is the whole conversation so far."""
    history: list[Message] = []
    print(HINT, file=sys.stderr)
    with _interrupts_raise():
        while True:
            try:
                message = _read_message()
            except KeyboardInterrupt:  # there is no reply to stop
                print(f"\n{HINT}", file=sys.stderr)
                continue
            if message is None or message == "/quit":
                return
            if message == "/reset":
                history = []
            elif re.fullmatch(r"/[a-z]+", message):
                print(f"there is no command {message}; accepted: /reset, /quit.", file=sys.stderr)
            elif message:
                history = _history_with_reply(sampler, config, history, message)


def with_compile_message(
    completions: Iterator[list["Completion"]], show: bool = True
) -> Iterator[list["Completion"]]:
    """Yields what `completions` yields, and shows a message while its programs are compiled."""
    from gemma2_jax.screen import activity

    with activity("compiling, and processing the prompt", show):
        first = next(completions, None)
    if first is not None:
        yield first
        yield from completions


def _history_with_reply(
    sampler: "Sampler", config: "SamplingConfig", history: list[Message], message: str
) -> list[Message]:
    """Prints the reply to a message; returns the history with both, or unchanged if the message is refused."""
    from gemma2_jax.config import UserError
    from gemma2_jax.data.chat_format import render

    messages: list[Message] = [*history, {"role": "user", "content": message}]
    try:
        prompt = render(messages, generation_prompt=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return history
    # A turn token inside the reply would end the turn there when the history is tokenised again.
    reply = re.sub("<(start|end)_of_turn>", "", _reply(sampler, config, prompt))
    return [*messages, {"role": "assistant", "content": reply}]


def _read_message() -> str | None:
    """Returns the next line without surrounding whitespace; None at the end of the input."""
    from gemma2_jax.config import UserError

    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UserError("the standard input is not UTF-8.") from None


def _reply(sampler: "Sampler", config: "SamplingConfig", prompt: str) -> str:
    """Prints the reply as it is generated; returns it, or the part before Ctrl-C."""
    text = ""
    with _stopping() as stopped:
        for (completion,) in with_compile_message(
            sampler.complete([prompt], config), show=sys.stderr.isatty()
        ):
            print(completion.text[len(text) :], end="", flush=True)
            text = completion.text
            if stopped:
                break
    print(flush=True)
    return text


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Yields a list that gets an entry at the first Ctrl-C in the block; the second one raises KeyboardInterrupt."""
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupts_raise() -> Iterator[None]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # enables line editing in `input`

    with stops.handled_elsewhere(signal.SIGINT):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
