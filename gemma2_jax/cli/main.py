"""The console script `gemma2`: parses the command line, runs one verb, reports errors in one sentence."""

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
    evaluate,
    fit,
    generate,
    inspect,
    launch,
    merge,
    plan,
    report,
    run,
    sweep,
    teacher_cache,
    tokenizer,
    train,
    train_together,
    watch,
)
from gemma2_jax.cli.mistakes import unknown_options
from gemma2_jax.cli.standard_streams import prepare_output, silence_libraries

DESCRIPTION = """\
Train, distil and inspect Gemma 2 in JAX.

  gemma2 run quickstart                    start here: a teacher, a student and a report, in minutes
  gemma2 train model=small_6m name=mine    one run, composed from config files and key=value
  gemma2 eval runs/mine                    perplexity and bits per byte of checkpoints, also beside a teacher
  gemma2 generate --checkpoint runs/mine --prompt "The function returns"
  gemma2 convert google/gemma-2-2b-it weights/2b-it     import released weights; also exports
  gemma2 VERB --help                       what a verb does, with examples
"""
VERBS = (
    run,
    train,
    train_together,
    teacher_cache,
    sweep,
    fit,
    report,
    watch,
    plan,
    launch,
    evaluate,
    generate,
    convert,
    merge,
    inspect,
    data,
    tokenizer,
    config,
)

RESUME_HINT = "the same command resumes from what is saved"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (by default, the process's own).

    Returns the exit code: 0 for success, 1 for failure, 128 + N after signal N (130: Ctrl-C). A wrong command line
    exits with 2, as in argparse. Prints the help if the verb, or the action of a verb, is missing.
    """
    prepare_output()
    silence_libraries()
    with stops.handled():
        arguments = parse_arguments(sys.argv[1:] if argv is None else list(argv))
        if "run" not in arguments:  # the verb or its action is missing
            arguments.help_parser.print_help()
            return 0
        code = _run(arguments)
        if argv is None and code:  # the process runs nothing else
            stops.leave_at_once(code)
    return code


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; the result has `run` if a verb is named. Exits with 2 if the command line is wrong."""
    parser = argparse.ArgumentParser(
        "gemma2", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of gemma2_jax and JAX"
    )
    parser.set_defaults(help_parser=parser)
    verbs = parser.add_subparsers(metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts positional arguments in one group only; key=value after an option ends up in `rest`.
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(unknown_options(rest, argv, "overrides" in arguments))
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


class _Version(argparse.Action):
    """Prints the versions for bug reports."""

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
    code, message = _outcome(arguments)
    # Only a verb that has joined other processes has imported this; the others need neither it nor JAX.
    ending = sys.modules.get("gemma2_jax.processes.ending")
    if ending is not None:
        ending.leave(code, message)
    if message is not None:
        print(message, file=sys.stderr)
    return code


def _file_problem(error: OSError) -> str | None:
    """Returns the problem with the error's file, or with the disk; None for other errors."""
    from gemma2_jax.files import reason

    place = error.filename2 or error.filename  # the target, where a file was to replace another one
    if isinstance(place, str):
        return f"{place} cannot be used: {reason(error, place)}"
    return reason(error) if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else None


def _memory_problem(error: Exception) -> str | None:
    """Returns what to do about an error for want of memory, of this machine or of a device; None for other errors."""
    if isinstance(error, MemoryError):
        place, what = "this machine", str(error)
    elif type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        place, what = "a device", str(error).splitlines()[0]
    else:
        return None
    detail = f" ({what})" if what else ""
    return f"the memory of {place} is too small{detail}; choose smaller sizes, such as a smaller batch or fewer tokens."


def _outcome(arguments: argparse.Namespace) -> tuple[int, str | None]:
    """Runs the verb; returns the exit code and the message to print, if any."""
    from gemma2_jax.config import UserError  # imports pydantic, which --help does not need

    try:
        with stops.resuming(lambda: RESUME_HINT if arguments.resumes else ""):
            return int(arguments.run(arguments) or 0), None
    except UserError as error:
        message = f"gemma2: {error}"
        return _stopped(error, message) if stops.requested() else (1, message)
    except BrokenPipeError:  # the other end of the pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:
        if stops.requested():  # C++ code has replaced our exception by this one
            return _stopped(error)
        if isinstance(error, OSError) and (problem := _file_problem(error)):
            return 1, f"gemma2: {problem}."
        if problem := _memory_problem(error):
            return 1, f"gemma2: {problem}"
        ending = sys.modules.get("gemma2_jax.processes.ending")
        if ending is None or not ending.is_watched():
            raise
        if not ending.follows_another():
            traceback.print_exc()  # in any process: a bug of ours, or a fault of its machine
        return 1, f"gemma2: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _stopped(error: BaseException, before: str = "") -> tuple[int, str]:
    """Returns the exit code and the message, appended to `before`, for a verb that a stop ended with `error`."""
    number = stops.number() or signal.SIGINT
    return 128 + number, before + stops.message(error)


if __name__ == "__main__":
    sys.exit(main())
