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

HINT = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops a reply"

Message = Mapping[str, object]


def check_turns(tokenizer: "Tokenizer") -> None:
    """Raises UserError if the tokenizer has no turn tokens, without which there is no chat."""
    from gemma2_jax.data.chat_format import render

    tokenizer.encode(render([{"role": "user", "content": "x"}], generation_prompt=True), control=True)


def chat(sampler: "Sampler", config: "SamplingConfig") -> None:
    """Reads a message, streams the reply, and so on; the whole conversation is the prompt of each reply."""
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
                history = _answered(sampler, config, history, message)


def announced(growing: Iterator[list["Completion"]], show: bool = True) -> Iterator[list["Completion"]]:
    """Passes on what a sampler yields, after it has shown that its programs are compiled first."""
    from gemma2_jax.screen import activity

    with activity("compiling, and reading the prompt", show):
        first = next(growing, None)
    if first is not None:
        yield first
        yield from growing


def _answered(
    sampler: "Sampler", config: "SamplingConfig", history: list[Message], message: str
) -> list[Message]:
    """Prints the reply to a message; returns the history with both, or as it was where the message is refused."""
    from gemma2_jax.config import UserError
    from gemma2_jax.data.chat_format import render

    asked: list[Message] = [*history, {"role": "user", "content": message}]
    try:
        prompt = render(asked, generation_prompt=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return history
    # A turn token that the model makes amid its reply would end the turn there when it is read again.
    reply = re.sub("<(start|end)_of_turn>", "", _reply(sampler, config, prompt))
    return [*asked, {"role": "assistant", "content": reply}]


def _read_message() -> str | None:
    """Returns the next line without blanks around it; None at the end of the input."""
    from gemma2_jax.config import UserError

    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UserError("the standard input is not UTF-8.") from None


def _reply(sampler: "Sampler", config: "SamplingConfig", prompt: str) -> str:
    """Prints the reply as it is made; returns it, or what there is of it when Ctrl-C stops it."""
    text = ""
    with _stopping() as stopped:
        for (completion,) in announced(sampler.complete([prompt], config), show=sys.stderr.isatty()):
            print(completion.text[len(text) :], end="", flush=True)
            text = completion.text
            if stopped:
                break
    print(flush=True)
    return text


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Gives a list that has an entry once Ctrl-C was pressed within; pressed again, it interrupts."""
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
        import readline  # noqa: F401  # gives `input` its line editing

    with stops.handled_elsewhere(signal.SIGINT):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
