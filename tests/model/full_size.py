"""The sides of the full-size check, each a process of its own: `python -m tests.model.full_size SIDE FOLDER`.

`write` makes a 2B-shaped Hugging Face checkpoint of random bfloat16 weights in FOLDER/model. `theirs` and
`ours` read it, and leave the logits of the same 512 tokens in FOLDER as .npy, float32 [T, V].
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.model.config import ModelConfig
from tests.model.models import released

LENGTH = 512
CONFIG: ModelConfig = replace(released("2b"), vocab_size=256_000, vocab_padding=0)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, LENGTH), dtype=np.int32)


def write(folder: Path) -> None:
    import torch
    import transformers

    from tests.model.reference import their_config

    torch.set_num_threads(os.cpu_count() or 1)  # `reference` leaves one
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Gemma2ForCausalLM(their_config(CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they start at 0, which shows nothing
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder / "model", max_shard_size="1GB")


def theirs(folder: Path) -> None:
    """In bfloat16, and in float32 with the same weights: one module after another, for its turn only.

    The embedding's factor, sqrt(2304), is 48 in both.
    """
    import torch
    import transformers

    model: Any = transformers.Gemma2ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16, attn_implementation="eager"
    )

    def save(name: str) -> None:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens()).long(), use_cache=False).logits
        np.save(folder / name, logits[0].float().numpy())

    def widen(module: Any, _: Any) -> None:
        module.float()

    def narrow(module: Any, *_: Any) -> None:
        module.bfloat16()

    save("theirs.npy")
    for module in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(narrow)
    save("exact.npy")


def ours(folder: Path) -> None:
    import jax

    from gemma2_jax.formats.huggingface import HuggingFaceSource
    from gemma2_jax.formats.load import load_params
    from gemma2_jax.model.config import ComputeConfig
    from gemma2_jax.model.transformer import Gemma2

    source = HuggingFaceSource(folder / "model")
    assert source.config == CONFIG
    model = Gemma2(CONFIG, load_params(source, CONFIG, "bfloat16"))
    forward = jax.jit(lambda model, tokens: model(tokens, compute=ComputeConfig(dtype="bfloat16"))[0])
    np.save(folder / "ours.npy", np.asarray(forward(model, tokens())))


if __name__ == "__main__":
    {"write": write, "theirs": theirs, "ours": ours}[sys.argv[1]](Path(sys.argv[2]))
