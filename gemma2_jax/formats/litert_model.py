"""The model inside a LiteRT-LM file: converted without its weights, which are then written behind it, one at a time.

The functions are converted with their weights as arguments, so that the converter never holds one. In the result, a
TFLite model, these arguments become constants: their buffers are places in the file behind the model's description. So
one buffer serves all functions, and the file may be larger than the 2 GB that a flatbuffer can be.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats.layouts import EMBEDDING
from gemma2_jax.formats.litert_graph import Graph
from gemma2_jax.formats.litert_private import Function, flatbuffer
from gemma2_jax.formats.litert_quantise import BLOCK, LiteRTStorage, encode_rows

Blocks = np.ndarray | Iterable[np.ndarray]  # a weight, whole or in blocks of rows

_ALIGNMENT = 64  # bytes; the engine's products need 16


def exported(graph: Graph, lengths: Sequence[int]) -> list[Function]:
    """The functions `prefill_T` for each length T, and `decode`, in StableHLO; their last inputs are the weights."""
    return [_exported(graph, f"prefill_{T}", T, False) for T in lengths] + [
        _exported(graph, "decode", 1, True)
    ]


def _exported(graph: Graph, name: str, T: int, has_logits: bool) -> Function:
    config = graph.config
    cache = jax.ShapeDtypeStruct((1, config.num_kv_heads, graph.context, config.head_dim), jnp.float32)
    inputs = {
        "tokens": jax.ShapeDtypeStruct((1, T), jnp.int32),
        "input_pos": jax.ShapeDtypeStruct((T,), jnp.int32),
        **dict.fromkeys(graph.caches, cache),
    }
    weights = {
        weight: jax.ShapeDtypeStruct(entry.shape, jnp.float32) for weight, entry in graph.weights.items()
    }
    names = [*inputs, *weights]
    outputs = graph.caches + (["logits"] if has_logits else [])

    def function(*arguments: jax.Array) -> list[jax.Array]:
        given = dict(zip(names, arguments, strict=True))
        found = graph.run(given, given, has_logits)
        return [found[output] for output in outputs]

    # `keep_unused`: arguments get their names by position, and prefill does not use the last layer's queries.
    whole = jax.export.export(jax.jit(function, keep_unused=True), platforms=["cpu"])(
        *inputs.values(), *weights.values()
    )
    return Function(name, whole.mlir_module_serialized, names, outputs)


def storages(graph: Graph, quantize: str | None) -> dict[str, LiteRTStorage]:
    """How each weight is stored, by name.

    Args:
        quantize: one of `litert_quantise.FORMATS`, or None for float32.

    Raises:
        UserError: rows of the model do not consist of whole blocks.
    """
    found = {}
    for name, entry in graph.weights.items():
        format_ = quantize if len(entry.shape) == 2 else None
        if format_ == "int4" and entry.tensor.weights == (EMBEDDING,):
            format_ = "int8"
        if format_ == "int4" and entry.shape[1] % BLOCK:
            raise UserError(
                f"{name} has rows of {entry.shape[1]} numbers, and int4 stores whole blocks of {BLOCK}; choose "
                "--quantize int8."
            )
        found[name] = LiteRTStorage(entry.shape, format_)
    return found


class ModelFile:
    """A TFLite model whose weights are behind its description.

    Args:
        functions: `exported(…)`; weights: how each of their weights is stored.
    """

    def __init__(self, functions: Sequence[Function], weights: dict[str, LiteRTStorage]) -> None:
        from litert_converter import schema_py_generated as schema

        self._schema: Any = schema
        self.weights = weights
        self.model = schema.ModelT.InitFromPackedBuf(flatbuffer(functions), 0)
        self._numbers = {name: self._add_buffer(storage.size) for name, storage in weights.items()}
        self._scales = {
            name: self._add_buffer(2 * math.prod(storage.scales))
            for name, storage in weights.items()
            if storage.format == "int4"
        }
        self._tensors: dict[str, list[Any]] = {name: [] for name in weights}  # of each subgraph
        for signature in self.model.signatureDefs:
            self._bind(self.model.subgraphs[signature.subgraphIndex], signature)
        self._drop_unused()
        self._place()

    def _add_buffer(self, size: int) -> int:
        """Adds a buffer outside the description, and returns its number; `_place` chooses its place."""
        # A place of 0 would be left out of the description, which would then grow.
        self.model.buffers.append(self._schema.BufferT(offset=1, size=size))
        return len(self.model.buffers) - 1

    def _offset(self, buffer: int) -> int:
        """The place of a buffer, in bytes from the beginning of the model."""
        offset: int = self.model.buffers[buffer].offset
        return offset

    def _bind(self, subgraph: Any, signature: Any) -> None:
        """Turns the arguments that are weights into constants."""
        inputs = {each.name.decode(): each.tensorIndex for each in signature.inputs}
        for name, storage in self.weights.items():
            tensor = subgraph.tensors[inputs[name]]
            tensor.buffer = self._numbers[name]
            kind = {None: "FLOAT32", "int8": "INT8", "int4": "INT4"}[storage.format]
            tensor.type = getattr(self._schema.TensorType, kind)
            tensor.quantization = self._quantization(subgraph, name, storage)
            self._tensors[name].append(tensor)
        table = inputs[next(iter(self.weights))]  # the embedding
        weights = {inputs[name] for name in self.weights}
        signature.inputs = [each for each in signature.inputs if each.tensorIndex not in weights]
        subgraph.inputs = np.array([number for number in subgraph.inputs if number not in weights], np.int32)
        self._look_up(subgraph, table)
        self._shrink(subgraph)

    def _quantization(self, subgraph: Any, name: str, storage: LiteRTStorage) -> Any:
        schema, found = self._schema, self._schema.QuantizationParametersT()
        if storage.format == "int8":
            found.scale = np.ones(storage.scales, np.float32)
            found.zeroPoint = np.zeros(storage.scales, np.int64)
        elif storage.format == "int4":
            scales = schema.TensorT(
                shape=np.array(storage.scales, np.int32),
                type=schema.TensorType.FLOAT16,
                buffer=self._scales[name],
                name=f"{name}_scales".encode(),
                hasRank=True,
            )
            subgraph.tensors.append(scales)
            found.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            found.details = schema.BlockwiseQuantizationT(
                scales=len(subgraph.tensors) - 1, zeroPoints=-1, blockSize=BLOCK
            )
        return found

    def _look_up(self, subgraph: Any, table: int) -> None:
        """Replaces the gathering of the table's rows, which exists for floats only, by a lookup that dequantises."""
        kinds = self._schema.BuiltinOperator
        codes = self.model.operatorCodes
        made_by = {number: operator for operator in subgraph.operators for number in operator.outputs}
        (gather,) = (
            operator
            for operator in subgraph.operators
            if codes[operator.opcodeIndex].builtinCode == kinds.GATHER_ND and operator.inputs[0] == table
        )
        reshape = made_by[gather.inputs[1]]  # [T] to [T, 1]
        gather.inputs = np.array([reshape.inputs[0], table], np.int32)
        gather.builtinOptionsType, gather.builtinOptions = self._schema.BuiltinOptions.NONE, None
        lookup = kinds.EMBEDDING_LOOKUP
        found = [number for number, code in enumerate(codes) if code.builtinCode == lookup]
        if not found:
            found = [len(codes)]
            version = 4  # with a scale for each row
            codes.append(self._schema.OperatorCodeT(lookup, None, version, lookup))
        gather.opcodeIndex = found[0]

    def _shrink(self, subgraph: Any) -> None:
        """Replaces repeated constants in comparisons, such as a mask's [1, T, S], by one number, which broadcasts."""
        kinds, codes = self._schema.BuiltinOperator, self.model.operatorCodes
        for operator in subgraph.operators:
            if codes[operator.opcodeIndex].builtinCode != kinds.EQUAL:
                continue
            for tensor in (subgraph.tensors[number] for number in operator.inputs):
                data = self.model.buffers[tensor.buffer].data
                if data is None or tensor.type != self._schema.TensorType.INT32:
                    continue
                numbers = np.frombuffer(bytes(data), np.int32)
                if (numbers == numbers[0]).all():
                    tensor.shape = np.ones_like(tensor.shape)
                    tensor.buffer = len(self.model.buffers)
                    self.model.buffers.append(self._schema.BufferT(data=numbers[:1].view(np.uint8)))

    def _drop_unused(self) -> None:
        """Empties the buffers that no tensor has any more."""
        used = {tensor.buffer for subgraph in self.model.subgraphs for tensor in subgraph.tensors}
        used |= {each.buffer for each in self.model.metadata or ()}
        for number, buffer in enumerate(self.model.buffers):
            if number not in used:
                buffer.data = None

    def _place(self) -> None:
        """Assigns each buffer its place behind the description, from the beginning of the model."""
        end = len(self._packed())
        for number in (*self._numbers.values(), *self._scales.values()):
            buffer = self.model.buffers[number]
            buffer.offset = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
            end = buffer.offset + buffer.size

    def _packed(self) -> bytes:
        import flatbuffers

        builder = flatbuffers.Builder(2**20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def pieces(self, tensors: Iterable[tuple[str, Blocks]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yields all content of the model: what it is, its place from the model's beginning, and the numbers.

        Args:
            tensors: all weights by name, in the order of `weights`, each whole or in blocks of rows.

        Raises:
            UserError: a weight holds a number that cannot be stored.
        """
        for (name, storage), (given, blocks) in zip(self.weights.items(), tensors, strict=True):
            assert given == name
            place, scales = self._offset(self._numbers[name]), []
            for block in [blocks] if isinstance(blocks, np.ndarray) else blocks:
                numbers, scale = encode_rows(block, storage.format, name)
                yield name, place, numbers
                place += numbers.nbytes
                scales.append(scale)
            if storage.format == "int4":
                yield name, self._offset(self._scales[name]), np.concatenate(scales)
            elif storage.format == "int8":
                for tensor in self._tensors[name]:
                    tensor.quantization.scale = np.concatenate(scales)
        description = np.frombuffer(self._packed(), np.uint8)
        assert len(description) <= self._offset(next(iter(self._numbers.values())))
        yield "the description of the model", 0, description
