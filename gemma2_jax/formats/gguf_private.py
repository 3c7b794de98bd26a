"""The private parts of `gguf` that this package uses."""

import struct
from typing import Any

import numpy as np


def header_reader(gguf: Any) -> Any:
    """Returns a subclass of `gguf.GGUFReader` that reads only the length of each list in the metadata.

    Args:
        gguf: the imported package, which is an optional dependency.
    """
    kinds = gguf.GGUFValueType

    class HeaderReader(gguf.GGUFReader):
        # The public reader creates an array for each piece of a tokenizer, which takes many seconds, and has no option
        # to skip them. If the package stopped calling this method, or called it with other arguments, `gemma2 inspect`
        # and the check of `gemma2 convert` would refuse every GGUF file, since they expect lengths instead of lists.
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            order = ">" if self.endianess == gguf.GGUFEndian.BIG else "<"
            item, length = struct.unpack_from(f"{order}IQ", self.data, orig_offs)
            end = orig_offs + struct.calcsize("<IQ")
            if item == kinds.STRING:
                size = struct.Struct(f"{order}Q")
                for _ in range(length):
                    end += size.size + size.unpack_from(self.data, end)[0]
            else:
                end += length * np.dtype(self.gguf_scalar_to_np[kinds(item)]).itemsize
            if end > len(self.data):
                raise ValueError("a list extends beyond the end of the file")
            return end - orig_offs, [np.array([length])], [0], [kinds.UINT64]

    return HeaderReader
