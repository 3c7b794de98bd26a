"""What was meant by a command line that argparse cannot take."""

import difflib
import re
from collections.abc import Sequence


def unknown_options(rest: Sequence[str], given: Sequence[str], takes_keys: bool) -> str:
    """Returns the sentence about arguments that no parser knows.

    Args:
        rest: those arguments; given: the whole command line.
        takes_keys: whether the verb takes key=value, which an option may stand for: `--steps 5` for training.steps=5.
    """
    meant = [_meant(text, given) for text in rest if text.startswith("--")] if takes_keys else []
    found = [text for text in meant if text is not None]
    hint = f" (did you mean {' '.join(found)}?)" if found else ""
    return f"unrecognized arguments: {' '.join(rest)}{hint}"


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """Returns the dotted key that `name` may stand for: one that ends so, else one that looks alike."""
    name = name.replace("-", "_").lower()
    endings = {key.rpartition(".")[2]: key for key in reversed(keys)}
    whole = [key for key in keys if key == name or key.endswith(f".{name}")]
    if whole:
        return min(whole, key=len)
    near = difflib.get_close_matches(name, [*keys, *endings], n=1, cutoff=0.7)
    return endings.get(near[0], near[0]) if near else None


def _meant(option: str, given: Sequence[str]) -> str | None:
    """Returns the key=value that an option stands for; None where no key is near."""
    from gemma2_jax.cli.compose import keys

    name, equals, value = option.removeprefix("--").partition("=")
    key = nearest_key(name, keys())
    if key is None:
        return None
    behind = given[given.index(option) + 1 :][:1]
    if not equals and behind and re.fullmatch(r"[^-=][^=]*|-[0-9.]+", behind[0]):
        value = behind[0]
    return f"{key}={value or '…'}"
