"""Run folders with difficult names: they can be read back, or are rejected before anything is written."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import CheckpointStore, load_model
from gemma2_jax.config import UserError
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.transformer import Gemma2
from tests.parameters import mostly_thorough


@mostly_thorough("name", ["a b", "50%", "%41", "a#b", "a?b", "a*", "ü&$HOME;'\"", "{x}"])
def test_a_path_is_no_url(toy_config, tmp_path, name):
    (tmp_path / "tokenizer.model").touch()
    model = Gemma2.init(toy_config, jax.random.key(0))
    write_run(tmp_path / name, toy_config, model.params(), tmp_path / "tokenizer.model")
    found = load_model(tmp_path / name).params()
    jax.tree.map(np.testing.assert_array_equal, found, model.params())


@pytest.mark.parametrize("name", ["[1]", "a\\b"])
def test_what_orbax_would_not_find_again(toy_config, tmp_path, name):
    folder = tmp_path / name / "run"
    for use in (
        lambda: write_run(folder, toy_config, {}, Path("none")),
        lambda: CheckpointStore(folder, keep=1),
    ):
        with pytest.raises(UserError, match=r"/run contains .*, which Orbax interprets as part of a pattern"):
            use()
    assert list(tmp_path.iterdir()) == []
