"""Standard streams: output that no terminal makes fail, and input as UTF-8 whatever the locale."""

import codecs
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HANDLER = "gemma2.ascii"
# What tables, messages and help texts hold beside ASCII.
_SPELT = {
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
    """Has standard output and standard error spell out what their encoding lacks, rather than fail.

    `PYTHONIOENCODING=ascii` and locales of one byte a character have no ≥ and no é: the first becomes >=, the second
    \\xe9. Streams that the user gave another error handler (`ascii:replace`) keep it.
    """
    codecs.register_error(_HANDLER, _spell)
    for stream in (sys.stdout, sys.stderr):
        # Python's own: strict, backslashes for standard error, and surrogateescape in the C locale.
        usual = getattr(stream, "errors", None) in ("strict", "backslashreplace", "surrogateescape")
        if usual and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def silence_libraries() -> None:
    """Keeps what libraries log (absl, Orbax, JAX) from standard error: what matters of it, errors of ours say.

    Python prints warnings of loggers that nothing handles; and a library that sets up handlers for the whole process
    does so only where there are none.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())


@contextmanager
def utf8_output() -> Iterator[None]:
    """Has standard output be UTF-8 within, unless it is a terminal: for a file that is read again, as it is meant."""
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
    """Returns the standard input, which is UTF-8.

    Raises:
        UserError: it is not.
    """
    from gemma2_jax.config import UserError

    try:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        return sys.stdin.read().removeprefix("\ufeff")  # Windows puts a byte order mark in front
    except UnicodeDecodeError as error:
        raise UserError(
            f"the standard input is not UTF-8 (it has a byte 0x{error.object[error.start]:02x} where UTF-8 has none); "
            "convert it, as with iconv -f latin1 -t utf-8."
        ) from None


def as_utf8(text: str) -> str:
    """Returns a text of the command line as UTF-8, where the locale's encoding has kept its bytes as surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # a byte of a file's name, as it is
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _SPELT.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1
