"""What transformers makes of an exported folder: the same logits, the same text, the same stops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.formats.load import load
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler

torch = pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
transformers = pytest.importorskip(
    "transformers", reason="needs the extra `reference`: pip install -e '.[reference]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "the model learns 42 from"


@pytest.fixture(scope="module")
def theirs(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="eager", dtype="float32"
    )
    return model.eval()


@pytest.mark.thorough
def test_the_same_logits(exported, theirs):
    assert type(theirs).__name__ == "Gemma2ForCausalLM"
    model, tokenizer = load(exported)
    ids = transformers.AutoTokenizer.from_pretrained(exported)(PROMPT)["input_ids"]
    assert ids == tokenizer.encode(PROMPT, bos=True)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    logits = jax.jit(model)(jnp.array([ids]))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_dtype_is_that_of_the_folder(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.thorough
def test_the_same_text_and_the_same_end(exported, theirs, tokenizer):
    """Greedy, with the end of generation as generation_config.json has it."""
    assert json.loads((exported / "generation_config.json").read_text()) == {
        "bos_token_id": 2,
        "eos_token_id": [tokenizer.eos_id, tokenizer.end_of_turn_id],
        "pad_token_id": 0,
    }
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.end_of_turn_id]
    ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)])
    written = theirs.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :].tolist()
    model, _ = load(exported)
    sampler = Sampler(model, tokenizer, ComputeConfig())
    [text] = sampler.generate([PROMPT], SamplingConfig(max_new_tokens=60, temperature=0.0))
    stop = {tokenizer.eos_id, tokenizer.end_of_turn_id}
    assert text == tokenizer.decode([token for token in written if token not in stop])
