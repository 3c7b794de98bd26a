"""Suggestions for a command line that argparse rejects."""

import difflib
import re
from collections.abc import Sequence


def unknown_options(rest: Sequence[str], argv: Sequence[str], takes_keys: bool) -> str:
    """Returns the error message for unknown arguments.

    Args:
        rest: unknown arguments.
        argv: the whole command line.
        takes_keys: whether the verb takes key=value; then `--steps 5` may mean training.steps=5.
    """
    suggestions = [_suggestion(text, argv) for text in rest if text.startswith("--")] if takes_keys else []
    found = [text for text in suggestions if text is not None]
    hint = f" (did you mean {' '.join(found)}?)" if found else ""
    return f"unrecognized arguments: {' '.join(rest)}{hint}"


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """Returns the dotted key that `name` may mean: one that ends with it, else a similar one; None if there is none."""
    name = name.replace("-", "_").lower()
    endings = {key.rpartition(".")[2]: key for key in reversed(keys)}
    whole = [key for key in keys if key == name or key.endswith(f".{name}")]
    if whole:
        return min(whole, key=len)
    near = difflib.get_close_matches(name, [*keys, *endings], n=1, cutoff=0.7)
    return endings.get(near[0], near[0]) if near else None


def _suggestion(option: str, argv: Sequence[str]) -> str | None:
    """Returns the key=value that an option may mean; None if no key is similar."""
    from gemma2_jax.cli.compose import keys

    name, equals, value = option.removeprefix("--").partition("=")
    key = nearest_key(name, keys())
    if key is None:
        return None
    following = argv[argv.index(option) + 1 :][:1]
    if not equals and following and re.fullmatch(r"[^-=][^=]*|-[0-9.]+", following[0]):
        value = following[0]
    return f"{key}={value or '…'}"
