"""The private name of `gguf` that `formats/gguf_private.py` uses."""

import inspect

import pytest

from tests.private_names import private

pytest.importorskip("gguf")

NO_GGUF = (
    "lists of a GGUF file are not passed over, and `gemma2 inspect` refuses it; see formats/gguf_private.py"
)


def test_the_reader_of_a_field() -> None:
    names = ["self", "orig_offs", "raw_type"]
    private("gguf", "gguf.gguf_reader:GGUFReader._get_field_parts", NO_GGUF, names)
    caller = inspect.getsource(private("gguf", "gguf.gguf_reader:GGUFReader._build_fields", NO_GGUF))
    assert "self._get_field_parts(" in caller, f"GGUFReader calls another method for a field: {NO_GGUF}"
