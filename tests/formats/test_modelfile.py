"""The Modelfile beside a GGUF file: Gemma 2's turns in Ollama's template, and never over another file."""

import re
from pathlib import Path

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import render
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.metadata import Metadata
from gemma2_jax.formats.modelfile import Modelfile


@pytest.fixture
def content(tokenizer: Tokenizer) -> str:
    found = Modelfile.of(Path("some/student.gguf"), tokenizer, Metadata())
    assert found is not None
    assert found.path == Path("some/student.Modelfile")
    return found.content


def filled(template: str, system: str, prompt: str, response: str) -> str:
    """The template as Ollama fills it, for a turn of the user and one of the model."""
    block = r"\{\{ if \.System \}\}(.*?)\{\{ end \}\}"
    text = re.sub(block, r"\1" if system else "", template, flags=re.DOTALL)
    for name, value in {"System": system, "Prompt": prompt, "Response": response}.items():
        text = text.replace(f"{{{{ .{name} }}}}", value)
    assert "{{" not in text
    return text


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_template_gives_gemma_2s_turns(content: str, system: str):
    found = re.search(r'TEMPLATE """(.*)"""', content, flags=re.DOTALL)
    assert found is not None
    user = f"{system}\n\nHello" if system else "Hello"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "Hi!"}]
    assert filled(found[1], system, "Hello", "Hi!") == render(turns)
    assert content.startswith("FROM ./student.gguf\n")
    assert re.findall("PARAMETER stop (.*)", content) == ["<start_of_turn>", "<end_of_turn>"]


def test_a_template_of_its_own_is_left_to_the_file(tokenizer: Tokenizer):
    found = Modelfile.of(Path("a.gguf"), tokenizer, Metadata(chat_template="{{ messages }}"))
    assert found is not None
    assert "TEMPLATE" not in found.content
    assert "PARAMETER stop <end_of_turn>" in found.content


def test_it_is_written_beside_the_file(run_folder, content, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    done = convert(run_folder, tmp_path / "student.gguf")
    beside = tmp_path / "student.Modelfile"
    assert beside.read_text() == content
    assert done.notes == (f"{beside} describes it for Ollama",)
    (tmp_path / "student.gguf").unlink()
    convert(run_folder, tmp_path / "student.gguf")  # the Modelfile that is left is the same
    (tmp_path / "student.gguf").unlink()
    beside.write_text("FROM elsewhere\n")
    with pytest.raises(
        UserError, match=r"student.Modelfile exists already with other content; choose another"
    ):
        convert(run_folder, tmp_path / "student.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["student.Modelfile"]
    assert beside.read_text() == "FROM elsewhere\n"
