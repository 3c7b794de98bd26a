"""The private parts of `litert_converter` that this package uses.

The converter's public interface takes models of PyTorch alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

# Turns StableHLO as JAX serialises it into the form that the converter takes.
_PASSES = (
    "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,"
    "func.func(stablehlo-legalize-composite-to-call),inline,strip-debuginfo)"
)


@dataclass(frozen=True)
class Function:
    """A function to convert.

    Attributes:
        name: name of its signature in the result.
        stablehlo: `jax.export.Exported.mlir_module_serialized`.
        inputs, outputs: names of its arguments and results, in order.
    """

    name: str
    stablehlo: bytes
    inputs: Sequence[str]
    outputs: Sequence[str]


def flatbuffer(functions: Sequence[Function]) -> bytes:
    """Returns one TFLite model (schema.fbs of LiteRT) with a subgraph and a signature for each function."""
    # Without it, importing the converter prints that its numbers could differ.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        modules = []
        for function in functions:
            module = ir.Module.parse(function.stablehlo)
            passmanager.PassManager.parse(_PASSES).run(module.operation)
            converter.set_signature(
                module.operation,
                signature_name=function.name,
                input_names=list(function.inputs),
                output_names=list(function.outputs),
            )
            modules.append(module)
        merged = converter.merge_modules(modules)
        config = converter.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        converter.run_convert_to_tfl_passes(merged, passmanager.PassManager(), config)
        result: bytes = converter.export_flatbuffer_to_bytes(merged.operation)
        return result
