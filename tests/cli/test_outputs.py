"""Places that cannot be written to, and disks that fail: one sentence, whatever the verb."""

import errno
from dataclasses import replace

import jax
import pytest

from gemma2_jax.cli import data as data_verb
from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.loop import train

PLACES = ["/dev/null/x", "/proc/x", "{file}", "{file}/x/y"]


@pytest.mark.parametrize("place", PLACES)
def test_the_folder_of_a_run(toy_run: RunConfig, place: str, tmp_path, monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    (tmp_path / "file").write_text("")
    output = place.format(file=tmp_path / "file")
    with pytest.raises(UserError, match=rf"^output is {output}, which cannot be used: .+\.$"):
        train(replace(toy_run, output=output))


@pytest.mark.parametrize("place", PLACES)
def test_the_folder_of_a_study(place: str, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    output = place.format(file=tmp_path / "file")
    assert main(["run", "quickstart", f"output={output}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"gemma2: output is {output}, which cannot be used: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            "/x/y cannot be used: Permission denied.",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"),
            "/x/y cannot be used: a file is in its",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (OSError(errno.EIO, "Input/output error"), "Input/output error."),
    ],
)
def test_errors_of_files_are_told_in_a_sentence(error: OSError, sentence: str, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(data_verb, "prepare", fail)
    assert main(["data", "prepare"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"gemma2: {sentence}")
    assert told.count("\n") == 1


def test_errors_of_other_things_are_not_hidden(monkeypatch):
    def fail(*args):
        raise OSError("a library's own")

    monkeypatch.setattr(data_verb, "prepare", fail)
    with pytest.raises(OSError, match="a library's own"):
        main(["data", "prepare"])
