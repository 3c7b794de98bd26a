"""A finite weight that a narrower dtype cannot hold is refused wherever weights are read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import load_model
from gemma2_jax.config import UserError
from gemma2_jax.formats.native import write_run
from gemma2_jax.model import narrowing
from gemma2_jax.model.narrowing import check_range
from gemma2_jax.model.transformer import Gemma2
from tests.parameters import mostly_thorough


@pytest.mark.parametrize(
    ("found", "wanted", "largest", "beyond", "wider"),
    [
        ("float32", "float16", 65519.0, 65520.0, "bfloat16 or float32"),
        ("bfloat16", "float16", 65280.0, 65536.0, "bfloat16 or float32"),
        ("float32", "bfloat16", 3.3895e38, 3.4e38, "float32"),
    ],
)
def test_the_largest_number(found, wanted, largest, beyond, wider, monkeypatch):
    monkeypatch.setattr(narrowing, "_BLOCK", 8)  # compared in several blocks, the last one shorter
    array = np.zeros((7, 5), found)
    array[0, :4] = [largest, -largest, np.inf, np.nan]
    check_range(array, wanted, "a")
    check_range(array.astype(found), found, "a")
    for sign in (1, -1):
        array[6, 4] = sign * beyond
        with pytest.raises(
            UserError, match=rf"^a has values beyond what {wanted} can hold; choose {wider}\.$"
        ):
            check_range(array, wanted, "a")


def test_a_wider_dtype_needs_no_look():
    array = np.full(3, 60000.0, np.float16)
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        check_range(array, dtype, "a")


@mostly_thorough(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_a_run(toy_config, tmp_path, dtype, value):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.touch()
    params = Gemma2.init(toy_config, jax.random.key(0)).params()
    for name, number in (("beyond", value), ("infinite", np.inf)):
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(number)
        write_run(tmp_path / name, toy_config, params, Path(tokenizer))
    with pytest.raises(UserError, match=rf"params/final_norm/scale has values beyond what {dtype} can hold"):
        load_model(tmp_path / "beyond", dtype)
    assert load_model(tmp_path / "beyond").final_norm.scale[...][3] == jnp.float32(value)
    assert jnp.isinf(load_model(tmp_path / "infinite", dtype).final_norm.scale[...][3])  # as it was
