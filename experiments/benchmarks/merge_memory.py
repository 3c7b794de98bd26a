"""Measures the memory for merging models.

    python experiments/benchmarks/merge_memory.py

Writes two Hugging Face folders of random bfloat16 weights with the sizes of --model (the 2B by default), and merges
them with each method, each time in a new process; everything is deleted at the end. For the 2B this takes 21 GB of
disk. The table gives the peak memory of the whole process, Python and libraries included, and the seconds taken, which
include reading the result back.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from import_memory import parser_of, sizes, write
from sentencepiece import sentencepiece_model_pb2
from shared import print_peak, print_peaks

from gemma2_jax.formats.merge import merge
from gemma2_jax.formats.source import TOKENIZER_FILE

METHODS = ("linear", "slerp", "ties")
PIECES: Any = sentencepiece_model_pb2  # as Any, since its classes exist only once it is imported


def tokenizer(tokens: int) -> bytes:
    """A SentencePiece model with this number of tokens."""
    proto = PIECES.ModelProto()
    kind = PIECES.ModelProto.SentencePiece
    first = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    first += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    for number in range(tokens):
        text, of = first[number] if number < len(first) else (f"piece{number}", kind.NORMAL)
        proto.pieces.add(piece=text, score=-number, type=of)
    # Gemma's settings, without which it could not be written for transformers.
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = PIECES.TrainerSpec.BPE, True
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    content: bytes = proto.SerializeToString()
    return content


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--merge", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        config = sizes(arguments.model, arguments.shrink)
        for seed in (0, 1):
            folder = Path(arguments.write, str(seed))
            folder.mkdir()
            write(folder, config, seed)
            (folder / TOKENIZER_FILE).write_bytes(tokenizer(config.vocab_size))
        return
    if arguments.merge:
        name, method = arguments.merge
        models = [Path(name, "0"), Path(name, "1")]
        base = models[0] if method == "ties" else None
        print_peak(lambda: merge(models, Path(name, method), method, base=base))
        return
    command = [sys.executable, __file__, "--model", arguments.model, "--shrink", str(arguments.shrink)]
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*command, "--write", name], check=True)
        print_peaks([*command, "--merge", name], METHODS)


if __name__ == "__main__":
    main()
