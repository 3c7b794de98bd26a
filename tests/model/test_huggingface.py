"""The same numbers as Hugging Face's Gemma 2, from a folder that `save_pretrained` wrote and our import read."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from tests.model.models import RELEASED, shrunk, vivid_weights
from tests.model.parity import TOLERANCE, batch_of, continued, errors, imported, learn, prompts_of, read

INSTALL = "needs the extra `reference`: pip install -e '.[reference]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)
pytestmark = pytest.mark.filterwarnings("ignore")

from tests.model import reference  # noqa: E402  # imports both

# Of weights and of prompts. Others do as well, but for those under which float32 decides (see `reference`).
SEEDS = {"2b": (9, 1), "9b": (6, 0), "27b": (19, 0)}


@dataclass(frozen=True)
class Pair:
    """The same weights on both sides."""

    name: str
    config: ModelConfig
    ours: Gemma2
    theirs: Any


@pytest.fixture(scope="module", params=RELEASED)
def pair(request, tmp_path_factory) -> Pair:
    config = shrunk(request.param, num_heads=4, head_dim=16)
    weights = vivid_weights(config, SEEDS[request.param][0])
    theirs = reference.build(config, weights)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    source = HuggingFaceSource(folder)
    assert source.config == config
    return Pair(request.param, config, imported(source), theirs)


def assert_same(pair: Pair, batch, expected) -> None:
    assert len(expected) == 2 + (pair.config.num_layers + 2) + (2 + 11 * pair.config.num_layers)
    found = errors({**read(pair.ours, batch), **learn(pair.ours, batch)}, expected)
    print({name: f"{error:.0e}" for name, error in sorted(found.items(), key=lambda item: -item[1])[:5]})
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCE}
    assert not wrong


def test_packed_documents(pair):
    """Each as if read alone: far shorter than the window, far longer, and longer than a block of queries."""
    batch = batch_of([[150], [3, 100, 30]], 150, pair.config.vocab_size)
    # In float64, all but its norms and softmax, so that its own rounding does not count as ours: as much as 6e-5 was
    # seen, and it differs by processor.
    theirs = copy.deepcopy(pair.theirs).double()
    with reference.largest_scores(pair.config.sliding_window) as largest:
        expected = reference.alone(theirs, batch)
    assert min(largest.values()) > 1.1  # far beyond both caps
    assert_same(pair, batch, expected)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding(pair, left):
    batch = batch_of([[20], [3], [37]], 40, pair.config.vocab_size, left=left)
    assert_same(pair, batch, reference.padded(pair.theirs, batch))


def test_greedy_tokens(pair):
    """One batch of prompts far shorter and far longer than the window; theirs are padded on the left."""
    prompts = prompts_of(pair.config.vocab_size, SEEDS[pair.name][1])
    expected, least_lead = reference.continued(pair.theirs, prompts)
    assert least_lead > 5e-3  # so that rounding decides nothing
    assert len(np.unique(expected)) > 40  # no token said again and again
    assert continued(pair.ours, prompts) == expected
