"""Writes a 2B-shaped Hugging Face folder of random bfloat16 weights: `python -m tests.formats.full_size FOLDER`.

5.2 GB. Numbers repeat after 4 million, which is no matter to formats, and takes seconds. The tokenizer has 256,000
pieces, most of which no text has.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from gemma2_jax.data.tokenizer import train_tokenizer
from gemma2_jax.formats.huggingface import write_shards
from gemma2_jax.formats.huggingface_config import CONFIG_FILE, config_json
from gemma2_jax.formats.layouts import HUGGINGFACE, expand
from gemma2_jax.formats.source import row_blocks
from gemma2_jax.model.weights import weight_specs
from tests.model.models import released

CONFIG = released("2b")
TEXTS = ["the model learns the text of the books"] * 20


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config_json(CONFIG, "bfloat16")))
    tokenizer = folder / "tokenizer.model"
    train_tokenizer(TEXTS, tokenizer, vocab_size=310)
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.read_bytes())  # type: ignore[attr-defined]
    for number in range(len(model.pieces), CONFIG.num_tokens):
        model.pieces.add(piece=f"zq{number}", score=-float(number), type=1)
    tokenizer.write_bytes(model.SerializeToString())
    entries = expand(HUGGINGFACE, weight_specs(CONFIG))
    pool = np.random.default_rng(0).standard_normal(2**22, np.float32)

    def blocks(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        size = 0.3 if "norm" in name else shape[-1] ** -0.5
        scaled = (pool * size).astype(ml_dtypes.bfloat16)
        for rows in row_blocks(shape):
            part = (rows.stop - rows.start, *shape[1:])
            yield scaled[: int(np.prod(part))].reshape(part)

    tensors = ((name, blocks(name, entry.shape)) for name, entry in entries.items())
    shapes = {name: entry.shape for name, entry in entries.items()}
    write_shards(folder, tensors, shapes, "bfloat16", 10**9)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
