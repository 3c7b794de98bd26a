"""Files that cannot be read or written, and disks that fail: one sentence from every command."""

import errno
import re
from dataclasses import replace

import jax
import pytest

from gemma2_jax.cli import data as data_verb
from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError, read_yaml
from gemma2_jax.run import RunConfig
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
    message = capsys.readouterr().err
    assert message.startswith(f"gemma2: output is {output}, which cannot be used: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "output=FILE/x"],
        ["train", "data.folder=FILE/x"],
        ["train", "tokenizer.path=FILE/x/y.model"],
        ["train", "compilation_cache=FILE/x"],
        ["train", "objective=distillation", "distill=cached", "distill.cache=FILE/x", "distill.teacher=null"],
        ["train", "distill.teacher=FILE/x", "objective=distillation", "distill=online"],
        ["train", "initialise.source=FILE/x"],
        ["train", "--config", "FILE/x"],
        ["train-together", "output=FILE/x", "--student", "one"],
        ["sweep", "seed=0,1", "output=FILE/x"],
        ["run", "quickstart", "output=FILE/x"],
        ["run", "quickstart", "data.folder=FILE/x"],
        [
            "teacher-cache",
            "objective=distillation",
            "distill=cached",
            "distill.cache=FILE/x",
            "distill.teacher=t",
        ],
        [
            "teacher-cache",
            "objective=distillation",
            "distill=cached",
            "distill.cache=FILE/x",
            "distill.teacher=null",
            "--verify",
        ],
        ["data", "prepare", "data.folder=FILE/x"],
        ["data", "show", "data.folder=FILE/x"],
        ["data", "verify", "data.folder=FILE/x"],
        ["tokenizer", "train", "tokenizer.path=FILE/x"],
        ["tokenizer", "show", "tokenizer.path=FILE/x"],
        ["convert", "SOURCE", "FILE/x"],
        ["convert", "FILE/x", "target"],
        ["inspect", "FILE/x"],
        ["eval", "FILE/x"],
        ["eval", "SOURCE", "--text", "a.txt", "--json", "FILE/x"],
        ["generate", "--checkpoint", "FILE/x", "--prompt", "a"],
        ["generate", "--checkpoint", "SOURCE", "--prompts", "FILE/x"],
        ["convert", "SOURCE", "target", "--tokenizer", "FILE/x"],
    ],
    ids=" ".join,
)
def test_a_path_below_a_file_is_reported_before_anything_is_created(
    arguments: list[str], tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = [text.replace("FILE", str(tmp_path / "file")) for text in arguments]
    assert main(given) == 1
    message = re.sub(r"gemma2: (loading|opening) .* …\n", "", capsys.readouterr().err)
    assert re.search(rf"{tmp_path}/file is (a file, where a folder is needed|not a folder)", message)
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/x/.y.tmp", None, "/x/y"),
            "/x/y cannot be used: Is a directory.",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (OSError(errno.EIO, "Input/output error"), "Input/output error."),
    ],
)
def test_file_errors_are_reported_in_one_sentence(error: OSError, sentence: str, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(data_verb, "prepare", fail)
    assert main(["data", "prepare"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"gemma2: {sentence}")
    assert message.count("\n") == 1


def test_errors_of_other_things_are_not_hidden(monkeypatch):
    def fail(*args):
        raise OSError("a library's own")

    monkeypatch.setattr(data_verb, "prepare", fail)
    with pytest.raises(OSError, match="a library's own"):
        main(["data", "prepare"])


def test_unreadable_config_files_are_reported(tmp_path, capsys):
    deep = "a: " + "[" * 3000 + "]" * 3000
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "deep.yaml").write_text(deep)
    (tmp_path / "circle").symlink_to("circle")
    for arguments, sentence in (
        (["model=deep", f"--config-dir={tmp_path}/configs"], "the configuration cannot be composed: "),
        ([f"--config-dir={tmp_path}/circle"], f"--config-dir is {tmp_path}/circle, which is not a folder"),
    ):
        assert main(["config", "show", *arguments]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"gemma2: {sentence}")
        assert message.count("\n") == 1
    with pytest.raises(UserError, match=r"deep\.yaml is nested too deeply to be read"):
        read_yaml(tmp_path / "configs" / "model" / "deep.yaml")
