"""Reads prompts from a file or the standard input: one per line, or JSON lines."""

import json
import sys
from pathlib import Path

from gemma2_jax.cli.standard_streams import read_standard_input


def read_prompts(path: str | None) -> list[str]:
    """Returns the prompts in a file: its non-blank lines, or the `prompt` of each line of JSON.

    The file is JSON if its name ends in .jsonl, or if its first line is an object with a `prompt`.

    Args:
        path: a file; `-` or None for the standard input. None is refused if the standard input is a terminal.

    Raises:
        UserError: the file cannot be read, holds no prompt, or is JSON with a line that has no `prompt`.
    """
    from gemma2_jax.config import UserError

    if path is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt; accepted: --prompt TEXT, --prompts FILE, --interactive, or prompts on the standard "
            "input, one per line."
        )
    name = "the standard input" if path in (None, "-") else str(path)
    text = read_standard_input() if path in (None, "-") else _read(str(path))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(
            f"{name} holds no prompt; accepted: one prompt per line, or lines of JSON such as {_EXAMPLE}."
        )
    if name.endswith(".jsonl") or _prompt(lines[0][1]) is not None:
        return [_parse_line(line, f"{name}, line {number}") for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


_EXAMPLE = '{"prompt": "text"}'


def _read(path: str) -> str:
    from gemma2_jax.config import UserError
    from gemma2_jax.files import reason

    try:
        return Path(path).read_text(encoding="utf-8-sig")  # skip the byte order mark that Windows writes
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {reason(error, path)}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"--prompts {path} is not UTF-8; convert it, for example with iconv -f latin1 -t utf-8."
        ) from None


def _parse_line(line: str, place: str) -> str:
    from gemma2_jax.config import UserError

    prompt = _prompt(line)
    if prompt is None:
        raise UserError(f"{place} is not a JSON object with a prompt; accepted: lines such as {_EXAMPLE}.")
    return prompt


def _prompt(line: str) -> str | None:
    """Returns the prompt in a line of JSON; None if the line has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) else None
