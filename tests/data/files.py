"""Small files of every kind, good and bad, for the tests of sources."""

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


def jsonl(texts: list[Any]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def parquet_bytes(texts: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": texts, "id": [1] * len(texts)}), sink)
    return bytes(sink.getvalue())


def parquet_of_bytes(texts: list[bytes]) -> bytes:
    """A string column of any bytes, UTF-8 or not."""
    ends = [sum(map(len, texts[:count])) for count in range(len(texts) + 1)]
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))]
    return parquet_bytes(pyarrow.Array.from_buffers(pyarrow.string(), len(texts), buffers))


def zstandard_frame(content: bytes, window_log: int) -> bytes:
    """A frame with a window of 2**window_log bytes; a compressor would need as much memory to write one."""
    header = bytes.fromhex("28b52ffd00") + bytes([(window_log - 10) << 3])
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(jsonl(texts))
    return path
