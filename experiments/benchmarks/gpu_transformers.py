"""The parts of `gpu.py` that run Hugging Face transformers, on torch's device."""

from dataclasses import replace
from functools import partial
from typing import Any

from experiments.benchmarks.gpu_common import (
    THEIRS,
    Figures,
    Report,
    Size,
    run_config,
    share_of_flops,
    speed,
    timed,
)
from gemma2_jax.formats.huggingface_config import config_json
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.counts import forward_flops_per_token


def train_transformers(size: Size, report: Report) -> None:
    report.attempt(f"training step, {size.student}", THEIRS, partial(their_step, size))


def their_step(size: Size) -> list[Figures]:
    import torch

    config = run_config(size)
    model = their_model(config.model)
    model.train()
    if config.compute.remat != "none":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(0, config.model.num_tokens, (1, size.length), device=model.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # shift_labels: all positions count, as on our side.
        model(ids, labels=ids, shift_labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    seconds, _ = timed(step, size.steps, synchronize)
    flops = build_method(config).flops_per_token * size.length
    return [speed(size.length, seconds, share_of_flops(flops, seconds, their_kind()), their_peak(), None)]


def decode_transformers(size: Size, report: Report) -> None:
    report.attempt(
        f"generation, {size.student}, weights in bfloat16", THEIRS, partial(their_generation, size)
    )


def their_generation(size: Size) -> list[Figures]:
    import torch

    sizes = run_config(size).model
    model = their_model(sizes)
    model.eval()
    prompt = torch.randint(0, sizes.num_tokens, (1, size.prompt), device=model.device)
    settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False)

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **settings)

    prefill, _ = timed(partial(generate, 1), size.steps, synchronize)
    whole, _ = timed(partial(generate, size.new_tokens + 1), size.steps, synchronize)
    name = f"{size.student}, weights in bfloat16"
    flops = forward_flops_per_token(sizes, size.prompt) * size.prompt
    share = share_of_flops(flops, prefill, their_kind())
    return [
        {"name": f"prefill, {name}"} | speed(size.prompt, prefill, share, their_peak(), None),
        {"name": f"decoding, {name}"}
        | speed(size.new_tokens, max(whole - prefill, 1e-9), None, their_peak(), None),
    ]


def their_model(config: ModelConfig) -> Any:
    """transformers' Gemma 2 of these sizes, with random weights in bfloat16, on the GPU if torch has one."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    values = config_json(replace(config, vocab_size=config.num_tokens, vocab_padding=0), "bfloat16")
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Gemma2ForCausalLM(Gemma2Config(**values, attn_implementation="eager"))


def synchronize(_: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def their_kind() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def their_peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
