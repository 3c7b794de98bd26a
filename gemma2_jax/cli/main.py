"""The console script `gemma2`: reads the command line, runs one verb, tells mistakes in one sentence."""

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import gemma2_jax
from gemma2_jax import stops
from gemma2_jax.cli import (
    config,
    convert,
    data,
    generate,
    inspect,
    launch,
    plan,
    run,
    sweep,
    teacher_cache,
    tokenizer,
    train,
    train_together,
)
from gemma2_jax.cli.mistakes import unknown_options
from gemma2_jax.cli.standard_streams import prepare_output, silence_libraries

DESCRIPTION = """\
Gemma 2 in JAX: train it, distil it, look at it.

  gemma2 run quickstart                    the first thing to try: a teacher, a student, a report, in minutes
  gemma2 train model=small_6m name=mine    one run, put together from config files and key=value
  gemma2 generate --checkpoint runs/mine --prompt "The function returns"
  gemma2 convert google/gemma-2-2b-it weights/2b-it     released weights as a run, and back again
  gemma2 VERB --help                       what a verb does, with examples
"""
VERBS = (
    run,
    train,
    train_together,
    teacher_cache,
    sweep,
    plan,
    launch,
    generate,
    convert,
    inspect,
    data,
    tokenizer,
    config,
)

GOES_ON = "the same command goes on with what is saved"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (that of the process by default).

    Returns the exit code: 0 done, 1 failed, 128 + N stopped by signal N (130: Ctrl-C). A wrong command line exits
    with 2, as argparse does. Without a verb, or the action of one, the help is printed.
    """
    prepare_output()
    silence_libraries()
    with stops.handled():
        arguments = parsed(sys.argv[1:] if argv is None else list(argv))
        if "run" not in arguments:  # a verb is missing, or an action
            arguments.shown.print_help()
            return 0
        code = _run(arguments)
        if argv is None and code:  # the process is this command's alone
            stops.leave_at_once(code)
    return code


def parsed(given: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, with those of its verb; `run` is there if it names one. Exits if it is wrong."""
    parser = argparse.ArgumentParser(
        "gemma2", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of gemma2_jax and JAX"
    )
    parser.set_defaults(shown=parser)
    verbs = parser.add_subparsers(metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    arguments, rest = parser.parse_known_args(given)
    # argparse takes positional arguments in one piece; key=value after an option lands in the rest.
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(unknown_options(rest, given, "overrides" in arguments))
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


class _Version(argparse.Action):
    """Prints the versions that a report of a fault needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version
        from platform import python_version

        try:
            jax = version("jax")
        except PackageNotFoundError:
            jax = "not installed"
        print(f"gemma2_jax {gemma2_jax.__version__} (Python {python_version()}, JAX {jax})")
        parser.exit()


def _run(arguments: argparse.Namespace) -> int:
    code, told = _outcome(arguments)
    # A verb that has joined other processes has loaded this; the others need neither it nor JAX.
    ending = sys.modules.get("gemma2_jax.processes.ending")
    if ending is not None:
        ending.leave(code, told)
    if told is not None:
        print(told, file=sys.stderr)
    return code


def _file_problem(error: OSError) -> str | None:
    """What is wrong with the file that an error names, or with the disk; None if it is of another kind."""
    from gemma2_jax.files import reason

    if isinstance(error.filename, str):
        return f"{error.filename} cannot be used: {reason(error)}"
    return reason(error) if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else None


def _outcome(arguments: argparse.Namespace) -> tuple[int, str | None]:
    """Runs the verb; returns the exit code and the message to print, if any."""
    from gemma2_jax.config import UserError  # brings pydantic, which --help does without

    try:
        with stops.resuming(lambda: GOES_ON if arguments.resumes else ""):
            return int(arguments.run(arguments) or 0), None
    except UserError as error:
        told = f"gemma2: {error}"
        return _stopped(error, told) if stops.requested() else (1, told)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:
        if stops.requested():  # some C++ code has made it of ours
            return _stopped(error)
        if isinstance(error, OSError) and (problem := _file_problem(error)):
            return 1, f"gemma2: {problem}."
        ending = sys.modules.get("gemma2_jax.processes.ending")
        if ending is None or not ending.is_watched():
            raise
        if not ending.follows_another():
            traceback.print_exc()  # of whichever process: it is a mistake of ours, or its machine's
        return 1, f"gemma2: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _stopped(error: BaseException, before: str = "") -> tuple[int, str]:
    """Returns the exit code and the last message, after `before`, of a verb that a stop has ended by `error`."""
    number = stops.number() or signal.SIGINT
    return 128 + number, before + stops.message(error)


if __name__ == "__main__":
    sys.exit(main())
