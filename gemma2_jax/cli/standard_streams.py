"""Standard streams: output that never fails on an encoding, and UTF-8 input whatever the locale."""

import codecs
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HANDLER = "gemma2.ascii"
# Replacements for the non-ASCII characters in tables, messages and help texts.
_REPLACEMENTS = {
    "≥": ">=",
    "≤": "<=",
    "–": "-",
    "…": "...",
    "×": "x",
    "±": "+-",
    "·": "*",
    "▁": "_",
    "█": "#",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "“": '"',
    "”": '"',
    "’": "'",
}


def prepare_output() -> None:
    """Makes standard output and standard error replace characters that their encoding lacks, instead of failing.

    `PYTHONIOENCODING=ascii` and single-byte locales may lack ≥ and é: the first becomes >=, the second \\xe9. A stream
    for which the user chose another error handler (`ascii:replace`) keeps it.
    """
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        # Python's defaults: strict, backslashreplace for standard error, and surrogateescape in the C locale.
        is_default = getattr(stream, "errors", None) in ("strict", "backslashreplace", "surrogateescape")
        if is_default and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def silence_libraries() -> None:
    """Keeps log messages of libraries (absl, Orbax, JAX) off standard error; our own errors report what matters.

    Python prints warnings of loggers without a handler, and libraries install process-wide handlers only if there
    are none. A handler that discards everything prevents both.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())


@contextmanager
def utf8_output() -> Iterator[None]:
    """Makes standard output UTF-8 within the block, unless it is a terminal: for output that will be read again."""
    stream: Any = sys.stdout
    if not hasattr(stream, "reconfigure") or stream.isatty():
        yield
        return
    before = stream.encoding
    stream.reconfigure(encoding="utf-8", errors=stream.errors)
    try:
        yield
    finally:
        stream.reconfigure(encoding=before, errors=stream.errors)


def read_standard_input() -> str:
    """Returns the standard input, decoded as UTF-8.

    Raises:
        UserError: the standard input is not UTF-8.
    """
    from gemma2_jax.config import UserError

    try:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        return sys.stdin.read().removeprefix("\ufeff")  # skip the byte order mark that Windows writes
    except UnicodeDecodeError as error:
        raise UserError(
            f"the standard input is not UTF-8 (it has an invalid byte 0x{error.object[error.start]:02x}); "
            "convert it, for example with iconv -f latin1 -t utf-8."
        ) from None


def as_utf8(text: str) -> str:
    """Returns a command-line text decoded as UTF-8, if the locale's encoding kept its bytes as surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # an undecodable byte, as in a file's name, unchanged
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _REPLACEMENTS.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1
