"""Prompts from a file or the standard input: one a line, or JSON lines."""

import json
import sys
from pathlib import Path

from gemma2_jax.cli.standard_streams import read_standard_input


def read_prompts(path: str | None) -> list[str]:
    """Returns the prompts in a file: those of its lines that are not blank, or the `prompt` of each line of JSON.

    It is JSON where its name ends in .jsonl, or where its first line is an object with a `prompt`.

    Args:
        path: `-` is the standard input, and so is None, which a terminal does not stand for.

    Raises:
        UserError: it cannot be read, holds no prompt, or a line that is no JSON beside lines that are.
    """
    from gemma2_jax.config import UserError

    if path is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt; accepted: --prompt TEXT, --prompts FILE, --interactive, or prompts on the standard "
            "input, one a line."
        )
    name = "the standard input" if path in (None, "-") else str(path)
    text = read_standard_input() if path in (None, "-") else _read(str(path))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name} holds no prompt; accepted: one a line, or lines of JSON such as {_EXAMPLE}.")
    if name.endswith(".jsonl") or _prompt(lines[0][1]) is not None:
        return [_of_json(line, f"{name}, line {number}") for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


_EXAMPLE = '{"prompt": "text"}'


def _read(path: str) -> str:
    from gemma2_jax.config import UserError
    from gemma2_jax.files import reason

    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows puts a byte order mark in front
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {reason(error, path)}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"--prompts {path} is not UTF-8; convert it, as with iconv -f latin1 -t utf-8."
        ) from None


def _of_json(line: str, place: str) -> str:
    from gemma2_jax.config import UserError

    prompt = _prompt(line)
    if prompt is None:
        raise UserError(f"{place} is no object with a prompt; accepted: lines such as {_EXAMPLE}.")
    return prompt


def _prompt(line: str) -> str | None:
    """Returns the prompt of a line of JSON; None where it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) else None
