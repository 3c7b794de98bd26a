"""The public API: fast to import, documented, and sufficient for everything that the command line does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma2_jax as g2
from gemma2_jax.run import RunConfig

NAMES = [name for name in g2.__all__ if name != "__version__"]


def test_importing_it_loads_nothing_else() -> None:
    shown = (
        "import gemma2_jax, sys; print([m for m in ('jax', 'flax', 'hydra', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("name", NAMES)
def test_each_name_has_a_docstring(name: str) -> None:
    found = getattr(g2, name)
    assert len(found.__doc__.split()) > 4
    assert name in dir(g2)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has compose, prepare"):
        g2.lode  # noqa: B018


@pytest.mark.thorough
def test_a_notebook_does_what_the_command_line_does(
    toy_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: device)
    config = replace(toy_run, output=str(tmp_path / "run"))
    g2.prepare(config.data, config.tokenizer)
    g2.train(config)
    model, tokenizer = g2.load(config.output)
    batch = next(g2.train_batches(config.data))

    method = g2.build_method(config)
    loss, sums = method.loss({"params": model.params()}, {"base": {}}, batch, jnp.int32(0))
    log_p = jax.nn.log_softmax(model(batch.tokens, batch.positions, batch.segment_ids))
    expected = -np.take_along_axis(np.asarray(log_p), batch.targets[..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(float((expected * batch.loss_mask).sum()), rel=1e-5)
    assert float(sums["targets"]) == batch.loss_mask.sum()

    states = g2.layer_states(model, batch.tokens[:1], layers=(0, 1))
    assert states[1].shape == (1, batch.tokens.shape[1], config.model.d_model)
    maps = g2.attention_maps(model, batch.tokens[:1], layers=(1,))
    np.testing.assert_allclose(np.sum(maps[1], axis=-1), 1, rtol=1e-5)

    assert g2.evaluate_run(config.output).perplexity > 1
    how = g2.SamplingConfig(max_new_tokens=4)
    assert len(g2.Sampler(model, tokenizer).generate(["a model"], how)) == 1
    g2.convert(config.output, tmp_path / "hf")
    again, _ = g2.load(tmp_path / "hf")
    np.testing.assert_array_equal(
        again.params()["final_norm"]["scale"], model.params()["final_norm"]["scale"]
    )
    assert g2.plan(config, "cpu:1").program.memory.peak > 0
    assert g2.count_parameters(model.config).total == sum(
        leaf.size for leaf in jax.tree.leaves(model.params())
    )
