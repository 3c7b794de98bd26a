"""The identity of a cache's teacher, computed from its weights."""

import hashlib
import json
from dataclasses import replace

import numpy as np

from gemma2_jax.config import to_dict
from gemma2_jax.formats.source import Source, all_places
from gemma2_jax.model.weights import weight_specs


def teacher_identity(source: Source) -> str:
    """SHA-256 of a checkpoint's configuration and weights, in hexadecimal.

    It does not depend on the path, the format or the padding of the vocabulary, as long as no weight changes its value.
    Reads all weights once, one at a time, which takes some seconds per billion parameters.

    Raises:
        UserError: the checkpoint is incomplete.
    """
    source.check()
    config = replace(source.config, vocab_size=source.config.num_tokens, vocab_padding=0)
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for place in all_places(weight_specs(source.config)):
        weight = source.weight(place)
        if place.path == "embedder/embedding":
            weight = weight[: config.num_tokens]
        digest.update(np.ascontiguousarray(weight.astype(np.float32)).view(np.uint8).data)
    return digest.hexdigest()
