"""The same as `parity`, computed by Hugging Face transformers: eager, since its sdpa attention drops the soft cap."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers

from gemma2_jax.data.batch import Batch
from gemma2_jax.model.config import ModelConfig
from tests.model.parity import NEW_TOKENS, Observed, documents

_IGNORED = -100  # the label of a token without loss

torch.set_num_threads(1)  # tiny models, which more threads make slower


def their_config(config: ModelConfig) -> Any:
    values: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        sliding_window=config.sliding_window,
        attn_implementation="eager",
        # A padding token's row would get no gradient, and an end-of-text token would end generation.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.Gemma2Config(**values)


def build(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Any:
    """Their model with these weights, by their names."""
    model = transformers.Gemma2ForCausalLM(their_config(config))
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model.eval()


def alone(model: Any, batch: Batch) -> Observed:
    """What it computes of a batch's documents, each read on its own, without padding."""
    model.zero_grad()
    collected: Observed = {}
    for row, columns in documents(batch):
        here = (slice(row, row + 1), columns)
        found = _observe(
            model, batch.tokens[here], batch.targets[here], batch.loss_mask[here], batch.loss_mask.sum()
        )
        for name, array in found.items():
            if name == "loss":
                collected[name] = collected.get(name, np.float32(0)) + array
            else:
                whole = np.zeros((*batch.tokens.shape, array.shape[-1]), np.float32)
                collected.setdefault(name, whole)[here] = array
    return {**collected, **_gradients(model)}


def padded(model: Any, batch: Batch) -> Observed:
    """What it computes of a batch of padded rows, read at once, with an attention mask."""
    model.zero_grad()
    real = batch.segment_ids > 0
    found = _observe(
        model, batch.tokens, batch.targets, batch.loss_mask, batch.loss_mask.sum(),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        position_ids=torch.from_numpy(batch.positions).long(),
    )  # fmt: skip
    arrays = {
        name: array if name == "loss" else np.where(real[:, :, None], array, 0)
        for name, array in found.items()
    }
    return {**arrays, **_gradients(model)}


def continued(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], float]:
    """NEW_TOKENS greedy tokens after each prompt, read in one left-padded batch, with the cache.

    Returns:
        The tokens, and by how much the best logit ever beat the next: less than rounding would make a
        comparison of tokens a matter of luck.
    """
    width = max(map(len, prompts))
    tokens, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), do_sample=False, use_cache=True,
        max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values
    return out.sequences[:, width:].tolist(), float((best[..., 0] - best[..., 1]).min())


@contextmanager
def largest_scores(window: int) -> Iterator[dict[str, float]]:
    """The largest tanh arguments: of "attention" scores that a local layer may see too, and of final "logits".

    In units of the cap: above 1, a soft cap takes away more than a quarter.
    """
    largest = {"attention": 0.0, "logits": 0.0}
    tanh = torch.tanh

    def record(x: Any) -> Any:
        kind = "attention" if x.ndim == 4 else "logits"
        seen = x.detach().tril().triu(1 - window) if kind == "attention" else x.detach()
        largest[kind] = max(largest[kind], float(seen.abs().max()))
        return tanh(x)

    with patch.object(torch, "tanh", record):
        yield largest


def _observe(
    model: Any, tokens: Any, targets: Any, loss_mask: Any, total: float, **inputs: torch.Tensor
) -> Observed:
    """Logits, hidden states, and the loss summed over targets and divided by `total`; gradients add up."""
    labels = torch.from_numpy(np.where(loss_mask > 0, targets, _IGNORED)).long()
    last: list[torch.Tensor] = []
    # Of the states after the last layer it gives only the normed ones.
    hook = model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    # shift_labels: the targets are shifted already.
    out = model(
        torch.from_numpy(tokens).long(), labels=labels, shift_labels=labels, num_items_in_batch=int(total),
        output_hidden_states=True, use_cache=False, **inputs,
    )  # fmt: skip
    hook.remove()
    out.loss.backward()
    *states, normed = out.hidden_states
    hidden = {f"hidden/{index}": state for index, state in enumerate([*states, *last, normed])}
    arrays = {"logits": out.logits, **hidden, "loss": out.loss}
    return {name: tensor.detach().numpy() for name, tensor in arrays.items()}


def _gradients(model: Any) -> Observed:
    return {f"gradient/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}
