"""What this package uses of the private names of `gguf`."""

import struct
from typing import Any

import numpy as np


def header_reader(gguf: Any) -> Any:
    """`gguf.GGUFReader` with a list's length in the place of each list of the metadata.

    Args:
        gguf: the package, which is an extra.
    """
    kinds = gguf.GGUFValueType

    class HeaderReader(gguf.GGUFReader):
        # The public reader makes arrays of each piece of a tokenizer, for many seconds, and has no option to pass them
        # over. If the package called this method otherwise, or not at all, `gemma2 inspect` and the check of
        # `gemma2 convert` would take lists for their lengths, and refuse every GGUF file.
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
