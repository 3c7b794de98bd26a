"""The private names of `litert_converter` that `formats/litert_private.py` uses."""

import pytest

from tests.private_names import private

pytest.importorskip("litert_converter", reason="the extra litert is not installed")

NO_LITERT = "`gemma2 convert … student.litertlm` fails; see formats/litert_private.py"
CONVERTER = "litert_converter.mlir._mlir_libs.converter_api_ext"


@pytest.mark.parametrize(
    "name",
    [
        "prepare_mlir_context",
        "set_signature",
        "merge_modules",
        "ConvertToTFLConfig.model_origin_framework",
        "run_convert_to_tfl_passes",
        "export_flatbuffer_to_bytes",
    ],
)
def test_the_functions_of_the_converter(name: str) -> None:
    private("litert-converter", f"{CONVERTER}:{name}", NO_LITERT)


@pytest.mark.parametrize("name", ["ModelT.InitFromPackedBuf", "BufferT", "BlockwiseQuantizationT"])
def test_the_schema_of_a_model(name: str) -> None:
    """Not private, but nowhere documented."""
    private("litert-converter", f"litert_converter.schema_py_generated:{name}", NO_LITERT)
