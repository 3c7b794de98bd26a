"""Errors of Orbax and of the disk become one sentence; other errors are unchanged, and no patch is left in place."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_jax.checkpoints.failures import reading_checkpoint, writing_checkpoint
from gemma2_jax.config import UserError
from tests.parameters import mostly_thorough


class WrappedError(Exception):
    """Stands for an exception type of Orbax."""


WrappedError.__module__ = "orbax.checkpoint.somewhere"


def fail_in(file: str, error: str) -> Callable[[], None]:
    """A function that raises `error`, as if it were in a source file of that path."""
    found: dict[str, Callable[[], None]] = {}
    exec(compile(f"def fail():\n    raise {error}", file, "exec"), found)
    return found["fail"]


def raise_from(error: Exception, cause: Exception | Callable[[], None]) -> None:
    """Raises `error` from a cause that was raised itself."""
    try:
        if isinstance(cause, Exception):
            raise cause
        cause()
    except Exception as raised:
        raise error from raised


IN_ORBAX = "/site-packages/orbax/checkpoint/_src/handlers/handler.py"


@mostly_thorough("error", ["OSError('no')", "ValueError('no')", "TypeError('no')", "Exception('no')"])
def test_what_orbax_raises_is_one_sentence(error: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"3 cannot be read as a checkpoint of a run: no\."),
        reading_checkpoint(tmp_path / "3"),
    ):
        fail_in(IN_ORBAX, error)()


def test_the_message_names_the_cause_and_not_its_wrapper(tmp_path: Path) -> None:
    cause = fail_in(IN_ORBAX, "ValueError('the cause')")
    with pytest.raises(UserError, match=r"checkpoint of a run: the cause\.$"), reading_checkpoint(tmp_path):
        raise_from(WrappedError("no handler"), cause)


@pytest.mark.parametrize(
    "error",
    [MemoryError("too much"), UserError("a sentence."), TypeError("of the caller"), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, reading_checkpoint(tmp_path):
        raise error
    assert raised.value is error
    with pytest.raises(type(error)) as raised, reading_checkpoint(tmp_path):
        raise_from(WrappedError("no handler"), error)
    assert raised.value is error


def test_an_error_of_ours_about_a_file_stays_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="our own words"), reading_checkpoint(tmp_path):
        raise_from(UserError("our own words."), OSError("the file system's"))


@pytest.mark.parametrize("error", [None, OSError("no"), MemoryError(), KeyboardInterrupt()])
def test_the_hook_is_given_back(error: BaseException | None, tmp_path: Path) -> None:
    hook = sys.unraisablehook
    try:
        with reading_checkpoint(tmp_path):
            assert sys.unraisablehook is not hook
            if error is not None:
                raise error
    except BaseException:
        assert error is not None
    assert sys.unraisablehook is hook


@pytest.mark.thorough
def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), writing_checkpoint(tmp_path):
        raise OSError("No space left on device")
