"""Adapters are merged into one adapter, or with their base into a complete model: both give the same weights."""

from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats.load import open_source
from gemma2_jax.formats.merge import merge
from gemma2_jax.formats.native import write_run
from gemma2_jax.formats.source import all_places
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.weights import weight_specs
from tests.formats.adapters import write_adapter
from tests.model.models import vivid

ONE = AdaptationConfig("lora", 2, 4.0, targets=("q", "up"))
OTHER = AdaptationConfig("lora", 3, 3.0, rslora=True, targets=("up", "down"), layers=(0,))


@pytest.fixture(scope="module")
def adapters(toy_run, tokenizer_config, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base and two adapters for it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_run(folder / "base", toy_run.model, vivid(toy_run.model).params(), Path(tokenizer_config.path))
    one = write_adapter(toy_run, folder / "base", ONE, folder / "one", 1)
    return folder / "base", one, write_adapter(toy_run, folder / "base", OTHER, folder / "other", 2)


@pytest.mark.parametrize(
    ("method", "weights", "factors"), [("linear", [1, 3], [0.25, 0.75]), ("task", None, [1, 1])]
)
@pytest.mark.thorough
def test_the_changes_are_summed(adapters, method, weights, factors, tmp_path):
    base, *both = adapters
    done = merge(both, tmp_path / "adapter", method, weights, kind="peft")
    assert done.target == "peft"
    found = open_source(tmp_path / "adapter")
    sources = [open_source(folder) for folder in (base, *both)]
    for place in all_places(weight_specs(found.config)):
        start, *changed = (source.weight(place).astype(np.float32) for source in sources)
        expected = start + sum(
            factor * (weight - start) for factor, weight in zip(factors, changed, strict=True)
        )
        np.testing.assert_allclose(found.weight(place), expected, rtol=1e-4, atol=1e-5)


def test_complete_models_are_merged_too(adapters, tmp_path):
    _, *both = adapters
    merge(both, tmp_path / "whole", "linear", [1, 3])
    merge(both, tmp_path / "adapter", "linear", [1, 3], kind="peft")
    whole, adapter = open_source(tmp_path / "whole"), open_source(tmp_path / "adapter")
    for place in all_places(weight_specs(whole.config)):
        np.testing.assert_allclose(whole.weight(place), adapter.weight(place), rtol=1e-4, atol=1e-5)


def test_refused(adapters, toy_run, tokenizer_config, tmp_path):
    base, one, other = adapters
    with pytest.raises(
        UserError, match="base is not a LoRA adapter, and --to peft merges adapters; leave out"
    ):
        merge([one, base], tmp_path / "new", "linear", kind="peft")
    with pytest.raises(
        UserError, match="--to peft merges adapters with --method linear or task, and needs no --base"
    ):
        merge([one, other], tmp_path / "new", "ties", base=base, kind="peft")
    params = vivid(toy_run.model, 2.0).params()
    write_run(tmp_path / "second", toy_run.model, params, Path(tokenizer_config.path))
    stranger = write_adapter(toy_run, tmp_path / "second", ONE, tmp_path / "stranger", 3)
    with pytest.raises(
        UserError, match=r"one is an adapter for .*base with the weights .*stranger is one for .*second"
    ):
        merge([one, stranger], tmp_path / "new", "linear", kind="peft")
    assert not (tmp_path / "new").exists()
