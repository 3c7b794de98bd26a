"""A model's identity is of its configuration and its weights' values, wherever and in whatever form they lie."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.teacher import DistillConfig, load_teacher
from gemma2_jax.formats import identity as identities
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.identity import model_identity, source_identity, weights_identity
from gemma2_jax.formats.layouts import EMBEDDING, WeightPlace
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.distill.test_cache import write_teacher
from tests.model.models import vivid
from tests.parameters import mostly_thorough


@pytest.fixture(scope="module")
def model(toy_run: RunConfig) -> Gemma2:
    return vivid(toy_run.model)


@pytest.fixture(scope="module")
def teacher(toy_run: RunConfig, model: Gemma2, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run folder with weights in float32, which bfloat16 does not hold."""
    return write_teacher(toy_run, model, tmp_path_factory.mktemp("identity") / "teacher")


@pytest.fixture(scope="module")
def known(teacher: str) -> str:
    return source_identity(open_source(teacher))


@mostly_thorough("padding", [0, 8])
@mostly_thorough("mesh", [MeshConfig(1, 4, 2), MeshConfig(4, 1, 2)])
def test_on_any_mesh_and_with_any_padding_it_is_the_checkpoints(
    toy_run: RunConfig, teacher: str, known: str, mesh: MeshConfig, padding: int
) -> None:
    tokens = toy_run.model.num_tokens
    student = replace(toy_run.model, vocab_size=tokens + padding, vocab_padding=padding)
    built = build_mesh(mesh)
    with jax.set_mesh(built):
        tokenizer = Tokenizer.load(toy_run.tokenizer.path)
        model = load_teacher(DistillConfig(teacher, "float32"), student, tokenizer, built)
        assert model_identity(model) == known


@mostly_thorough("dtype", ["float32", "bfloat16"])
def test_in_another_format_it_is_the_same(teacher: str, tmp_path: Path, dtype: str) -> None:
    """Whether its file is in float32 or in bfloat16, and loaded in that or in a wider dtype."""
    convert(teacher, tmp_path / "exported", dtype=dtype)
    convert(tmp_path / "exported", tmp_path / "back", "run")
    expected = source_identity(open_source(tmp_path / "exported"))
    assert source_identity(open_source(tmp_path / "back")) == expected
    for loaded in {"float32", dtype}:
        assert model_identity(load(tmp_path / "exported", loaded)[0]) == expected


def test_a_teacher_that_is_rounded_keeps_an_identity_of_its_own(teacher: str, known: str) -> None:
    rounded = model_identity(load(teacher, "bfloat16")[0])
    assert rounded == model_identity(load(teacher, "bfloat16")[0])
    assert rounded != known


def in_layers(model: Gemma2) -> Iterator[tuple[WeightPlace, np.ndarray]]:
    """The weights as a checkpoint that is read one at a time gives them, the last first."""
    for path, leaf in reversed(jax.tree.leaves_with_path(model.params())):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("pairs/"):
            yield from ((WeightPlace(name, pair), part) for pair, part in enumerate(np.asarray(leaf)))
        else:
            yield WeightPlace(name, None), np.asarray(leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_weight_at_a_time_gives_the_same(
    model: Gemma2, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(identities, "_CHUNK", 100)  # no divisor of what any weight holds
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params())
    smallest = {"float32": 1e-45, "bfloat16": 1e-40, "float16": 1e-7}[dtype]
    scale = np.array(params["final_norm"]["scale"])
    scale[:2] = [-0.0, smallest]  # of which devices may make 0 where they compute with it
    assert scale[1] != 0
    params["final_norm"]["scale"] = jnp.asarray(scale)
    model = Gemma2(model.config, params)
    assert weights_identity(model.config, in_layers(model)) == model_identity(model)


def test_every_other_weight_or_setting_gives_another(toy_config: ModelConfig) -> None:
    model = vivid(replace(toy_config, num_layers=4))
    params = model.params()
    found = {model_identity(model), model_identity(Gemma2(replace(model.config, sliding_window=4), params))}
    leaves, tree = jax.tree.flatten(params)
    for index, leaf in enumerate(leaves):
        others = [
            leaf.at[(-1,) * leaf.ndim].set(jnp.nextafter(leaf[(-1,) * leaf.ndim], jnp.inf)),  # by one bit
            leaf[::-1],  # the same numbers elsewhere: in another layer, or for another token or channel
        ]
        for other in others:
            changed = Gemma2(
                model.config, jax.tree.unflatten(tree, [*leaves[:index], other, *leaves[index + 1 :]])
            )
            found.add(model_identity(changed))
    assert len(found) == 2 + 2 * len(leaves)


def test_it_is_what_records_and_caches_were_written_with(toy_config: ModelConfig) -> None:
    """Where this fails, each teacher has another identity: raise FORMAT in teacher_record.py and cache/manifest.py."""
    weights = [
        (WeightPlace(EMBEDDING, None), np.arange(6, dtype=np.float32).reshape(3, 2)),
        (WeightPlace("pairs/local_block/mlp/up", 1), np.full(4, -0.5, np.float32)),
    ]
    config = replace(toy_config, vocab_size=3, vocab_padding=1)
    assert (
        weights_identity(config, weights)
        == "d60e9d62bb8b49e0b5d91bf1bfd8fda72501423323786e04eb99b138385f8643"
    )
