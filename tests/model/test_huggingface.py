"""The same logits as Hugging Face's Gemma 2, eager (its sdpa attention drops the soft cap)."""

import jax
import numpy as np
import pytest

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from tests.model.models import vivid

torch = pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
transformers = pytest.importorskip(
    "transformers", reason="needs the extra `reference`: pip install -e '.[reference]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")


def in_torch(model: Gemma2, config: ModelConfig):
    """Hugging Face's model with the weights of `model`."""
    theirs = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
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
        )
    ).eval()
    params = jax.tree.map(np.asarray, model.params())
    weights = {
        "model.embed_tokens.weight": params["embedder"]["embedding"],
        "lm_head.weight": params["embedder"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    for layer in range(config.num_layers):
        block = params["pairs"]["global_block" if layer % 2 else "local_block"]
        block = jax.tree.map(lambda weight, index=layer // 2: weight[index], block)
        D = config.d_model
        each = {
            "self_attn.q_proj": block["attention"]["query"].reshape(D, -1).T,
            "self_attn.k_proj": block["attention"]["key"].reshape(D, -1).T,
            "self_attn.v_proj": block["attention"]["value"].reshape(D, -1).T,
            "self_attn.o_proj": block["attention"]["output"].reshape(-1, D).T,
            "mlp.gate_proj": block["mlp"]["gate"].T,
            "mlp.up_proj": block["mlp"]["up"].T,
            "mlp.down_proj": block["mlp"]["down"].T,
            "input_layernorm": block["pre_attention_norm"]["scale"],
            "post_attention_layernorm": block["post_attention_norm"]["scale"],
            "pre_feedforward_layernorm": block["pre_mlp_norm"]["scale"],
            "post_feedforward_layernorm": block["post_mlp_norm"]["scale"],
        }
        weights |= {f"model.layers.{layer}.{name}.weight": value for name, value in each.items()}
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return theirs


def test_logits(toy_config):
    model = vivid(toy_config, size=4.0)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 30))
    with torch.no_grad():
        expected = in_torch(model, toy_config)(torch.tensor(tokens)).logits.numpy()
    assert 15 < np.abs(expected).max() < 30  # the caps matter
    np.testing.assert_allclose(jax.jit(model)(tokens), expected, atol=2e-3)
