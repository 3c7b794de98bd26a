"""The importance of inputs on data: the mean squares of activations, and their effect on calibrated files."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.calibration import Calibration
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.gguf_source import GGUFSource
from gemma2_jax.formats.load import open_source
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Collector
from tests.model.models import vivid

TEXT = "The model learns the text of the books, and the teacher learns more."


@pytest.fixture(scope="module")
def wide(toy_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """A model whose rows are whole super-blocks."""
    sizes = dict(num_layers=2, d_model=256, num_heads=2, num_kv_heads=1, head_dim=128, d_ff=512)
    return replace(
        toy_config,
        vocab_size=tokenizer.vocab_size,
        vocab_padding=0,
        query_pre_attn_scalar=128,
        sliding_window=64,
        **sizes,
    )


@pytest.fixture(scope="module")
def run_folder(wide, tokenizer_config, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("calibration") / "run"
    write_run(folder, wide, vivid(wide).params(), Path(tokenizer_config.path))
    return folder


class Everything(Collector):
    def of_block(self, block, taps):
        return taps


def test_it_is_the_mean_square_of_what_enters_each_matrix(run_folder, wide, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    found = Calibration(str(tmp_path / "*.txt"))(open_source(run_folder))
    tokens = jnp.array([tokenizer.encode(TEXT, bos=True)[:-1]])
    final, taps = vivid(wide).collect(Everything(), tokens)
    expected = {"token_embd": final}
    for kind, block in enumerate(("local_block", "global_block")):
        for tap, names in (
            ("attention_input", ("attn_q", "attn_k", "attn_v")),
            ("heads", ("attn_output",)),
            ("mlp_input", ("ffn_gate", "ffn_up")),
            ("mlp_hidden", ("ffn_down",)),
        ):
            expected |= {f"blk.{kind}.{name}": taps[block][tap][0] for name in names}
    assert set(found) == {f"{name}.weight" for name in expected}
    for name, activations in expected.items():
        squares = np.square(np.asarray(activations)).reshape(tokens.shape[1], -1).mean(axis=0)
        np.testing.assert_allclose(found[f"{name}.weight"], squares, rtol=2e-4, atol=1e-6)


@pytest.mark.thorough
def test_prepared_data_gives_its_training_split(run_folder, data: DataConfig):
    found = Calibration(data.folder)(open_source(run_folder))
    assert found["blk.1.ffn_down.weight"].shape == (512,)
    assert found["token_embd.weight"].min() > 0


@pytest.mark.thorough
def test_important_inputs_are_more_exact_in_the_file(run_folder, corpus, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    calibration = Calibration(str(corpus))
    source = open_source(run_folder)
    importance = calibration(source)
    convert(run_folder, tmp_path / "plain.gguf", dtype="q4_k_m")
    convert(run_folder, tmp_path / "calibrated.gguf", dtype="q4_k_m", calibrate=calibration)
    plain, calibrated = (GGUFSource(tmp_path / f"{name}.gguf") for name in ("plain", "calibrated"))
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_q.weight"):
        entry = plain.entries[name]
        original = entry.join([source.weight(place) for place in entry.places])
        errors = [
            float((importance[name] * (file.read(name) - original) ** 2).sum())
            for file in (plain, calibrated)
        ]
        assert errors[1] < 0.97 * errors[0], name


def test_data_that_is_missing_is_refused(run_folder, tmp_path, data: DataConfig):
    with pytest.raises(UserError, match=r"--calibrate .*none.txt"):
        Calibration(str(tmp_path / "none.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder"):
        Calibration(str(tmp_path / "folder"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"--calibrate .*empty.txt holds no text"):
        Calibration(str(tmp_path / "empty.txt"))(open_source(run_folder))


def test_other_dtypes_take_no_calibration(run_folder, corpus, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    for dtype, shown in (("q8_0", "q8_0"), (None, "that of the source")):
        with pytest.raises(
            UserError, match=f"--calibrate chooses the grids of .*, but the dtype is {shown};"
        ):
            convert(run_folder, tmp_path / "a.gguf", dtype=dtype, calibrate=Calibration(str(corpus)))
