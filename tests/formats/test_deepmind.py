"""DeepMind's Orbax layout, written by Orbax itself: flat and nested, with and without its database format."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from gemma2_jax.config import UserError
from gemma2_jax.formats.deepmind import DeepMindSource
from gemma2_jax.formats.load import load, load_params, open_source
from tests.parameters import mostly_thorough


def theirs(params, config, transposed, flat):
    """The tree that DeepMind's library saves, mapped by hand."""
    tree = {
        "embedder": {"input_embedding": params["embedder"]["embedding"]},
        "final_norm": {"scale": params["final_norm"]["scale"]},
    }
    for layer in range(config.num_layers):
        kind = "global_block" if layer % 2 else "local_block"
        block = jax.tree.map(lambda leaf, pair=layer // 2: np.asarray(leaf[pair]), params["pairs"][kind])
        attention, mlp = block["attention"], block["mlp"]
        gating = np.stack([mlp["gate"], mlp["up"]])
        tree[f"layer_{layer}"] = {
            "attn": {
                "q_einsum": {"w": attention["query"].transpose(1, 0, 2)},
                "kv_einsum": {
                    "w": np.stack([attention[name].transpose(1, 0, 2) for name in ("key", "value")])
                },
                "attn_vec_einsum": {"w": attention["output"]},
            },
            "mlp": {
                "gating_einsum": gating.transpose(0, 2, 1) if transposed else gating,
                "linear": mlp["down"],
            },
            "pre_attention_norm": {"scale": block["pre_attention_norm"]["scale"]},
            "post_attention_norm": {"scale": block["post_attention_norm"]["scale"]},
            "pre_ffw_norm": {"scale": block["pre_mlp_norm"]["scale"]},
            "post_ffw_norm": {"scale": block["post_mlp_norm"]["scale"]},
        }
    return flattened(tree) if flat else tree


def flattened(tree):
    """'transformer/layer_0/attn/q_einsum' -> {'w': …}, as in the released files."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *above, name = [entry.key for entry in path]
        if name in ("gating_einsum", "linear"):
            above, name = [*above, name], "w"
        flat.setdefault("/".join(["transformer", *above]), {})[name] = leaf
    return flat


def save(folder, tree, ocdbt=True, zarr3=False):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)).save(
        folder.absolute(), tree
    )
    return folder


@mostly_thorough("transposed", [False, True], ids=["plain", "transposed"])
@mostly_thorough("flat", [False, True], ids=["nested", "flat"])
@mostly_thorough("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_read(tmp_path, small, params, tokenizer_config, transposed, flat, ocdbt):
    folder = save(tmp_path / "dm", theirs(params, small, transposed, flat), ocdbt)
    source = open_source(folder)
    assert isinstance(source, DeepMindSource)
    assert source.config == small
    assert source.problems() == []
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


@mostly_thorough("name", ["a b", "50%", "%41", "a#b", "a?b", "[1]*", "ü&$HOME;'\""])
@mostly_thorough("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_a_path_is_no_url(tmp_path, small, params, ocdbt, name):
    saved = save(tmp_path / "dm", theirs(params, small, False, True), ocdbt)
    folder = saved.rename(tmp_path / name)
    source = open_source(folder)
    assert source.problems() == []
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_zarr3(tmp_path, small, params, ocdbt):
    folder = save(tmp_path / "dm", theirs(params, small, False, False), ocdbt, zarr3=True)
    source = open_source(folder)
    assert source.problems() == []
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


@mostly_thorough("flat", [False, True], ids=["nested", "flat"])
@mostly_thorough("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_a_tree_within_another(tmp_path, small, params, ocdbt, flat):
    """As a training state, whose optimizer has a copy of every name."""
    tree = theirs(params, small, False, flat)
    state = {"params": tree, "opt_state": {"mu": {"params": tree}}, "step": np.zeros(1, np.int32)}
    source = open_source(save(tmp_path / "dm", state, ocdbt))
    assert (source.problems(), source.config) == ([], small)
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


def test_several_trees(tmp_path, small, params):
    tree = theirs(params, small, False, False)
    folder = save(tmp_path / "dm", {"ema": tree, "raw": tree})
    with pytest.raises(
        UserError, match=r"dm holds several models, ema/, raw/; accepted: a single one, or one at params/\."
    ):
        open_source(folder)


def test_the_tokenizer_is_next_to_the_checkpoint_folder(tmp_path, small, params, tokenizer, tokenizer_config):
    folder = save(tmp_path / "dm", theirs(params, small, False, True))
    with pytest.raises(UserError, match=r"dm has no tokenizer.model"):
        load(folder)
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer_config.path).read_bytes())
    model, found = load(folder)
    assert found.fingerprint == tokenizer.fingerprint
    assert model.embedder.embedding[...].dtype == np.float32


def test_missing_extra_and_misshaped_tensors(tmp_path, small, params):
    tree = theirs(params, small, False, False)
    del tree["layer_2"]["mlp"]["linear"]
    tree["layer_1"]["mlp"]["bias"] = np.zeros(3, np.float32)
    tree["final_norm"]["scale"] = np.zeros(5, np.float32)
    tree["layer_3"]["attn"]["q_einsum"]["w"] = tree["layer_3"]["attn"]["q_einsum"]["w"].astype(np.int32)
    folder = save(tmp_path / "dm", tree)
    problems = open_source(folder).problems()
    assert problems == [
        f"{folder} lacks the tensor layer_2/mlp/linear of shape [64, 32].",
        f"{folder} holds final_norm/scale of shape [5], but the model has [32].",
        f"{folder} holds the tensor layer_1/mlp/bias, which this model does not have.",
        f"{folder} holds layer_3/attn/q_einsum as int32; accepted: float32, bfloat16, float16.",
    ]
    with pytest.raises(UserError, match=r"lacks the tensor layer_2/mlp/linear.*3 more"):
        load_params(open_source(folder), small, "float32")


def test_what_is_no_gemma_2(tmp_path, small, params):
    tree = theirs(params, small, False, False)
    first = {**tree, "layer_0": {name: w for name, w in tree["layer_0"].items() if "post" not in name}}
    with pytest.raises(
        UserError, match="is a Gemma 1, not a Gemma 2, in DeepMind's layout: it lacks the tensor layer_0/post"
    ):
        open_source(save(tmp_path / "gemma1", first))
    with pytest.raises(UserError, match=r"lacks the tensor embedder/input_embedding and holds weights\."):
        open_source(save(tmp_path / "other", {"weights": np.zeros(3)}))
    tree["layer_0"]["attn"]["_query_norm"] = {"scale": np.zeros(8, np.float32)}
    with pytest.raises(UserError, match=r"gemma3 is a Gemma 3 in DeepMind's layout; accepted: Gemma 2\."):
        open_source(save(tmp_path / "gemma3", tree))


def test_a_truncated_array(tmp_path, small, params):
    folder = save(tmp_path / "dm", theirs(params, small, False, False), ocdbt=False)
    chunk = folder / "layer_1.attn.q_einsum.w" / "0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match=r"dm: layer_1/attn/q_einsum cannot be read: "):
        load_params(open_source(folder), small, "float32")


@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_a_lost_array_is_not_zeros(tmp_path, small, params, ocdbt):
    folder = save(tmp_path / "dm", theirs(params, small, False, False), ocdbt)
    if ocdbt:
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
        store.delete_range(
            ts.KvStore.KeyRange("layer_1.attn.q_einsum.w/0", "layer_1.attn.q_einsum.w/1")
        ).result()
    else:
        (folder / "layer_1.attn.q_einsum.w" / "0.0.0").unlink()
    with pytest.raises(UserError, match=r"dm: layer_1/attn/q_einsum cannot be read: .*is missing"):
        load_params(open_source(folder), small, "float32")


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_lost_layers_do_not_make_a_smaller_model(tmp_path, small, params, flat):
    folder = save(tmp_path / "dm", theirs(params, small, False, flat), ocdbt=False)
    for path in [*folder.glob("layer_[23].*"), *folder.glob("transformer/layer_[23]")]:
        shutil.rmtree(path)
    problems = open_source(folder).problems()
    assert len(problems) == 2 * 9
    assert problems[0] == f"{folder} lacks the tensor layer_2/pre_attention_norm/scale of shape [32]."
    # Where the checkpoint lists nothing, its shapes are all there is to go by.
    folder = save(tmp_path / "unlisted", theirs(params, small, False, flat))
    (folder / "_METADATA").unlink()
    assert open_source(folder).config == small


@pytest.mark.parametrize("content", ["", "[]", '{"tree_metadata": {"a": 3}}'])
def test_a_damaged_list_of_arrays(tmp_path, small, params, content):
    folder = save(tmp_path / "dm", theirs(params, small, False, False))
    (folder / "_METADATA").write_text(content)
    with pytest.raises(UserError, match=r"dm/_METADATA is truncated or does not list the arrays"):
        open_source(folder)
