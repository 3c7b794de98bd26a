"""Merging checkpoints of every kind: read in parts, verified, refused in one sentence, never half written."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma2_jax.config import UserError
from gemma2_jax.formats import source as source_module
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.formats.merge import merge
from gemma2_jax.formats.native import RunSource, write_run
from gemma2_jax.model.transformer import Gemma2
from tests.formats.test_deepmind import save, theirs
from tests.model.models import vivid


@pytest.fixture(scope="module")
def others(small, tokenizer_config, tmp_path_factory) -> tuple[Path, Path]:
    """Two more models of the same sizes: a run folder in float32, and a Hugging Face folder in float32."""
    folder = tmp_path_factory.mktemp("others")
    for seed, name in ((1, "run"), (2, "second")):
        write_run(
            folder / name,
            small,
            Gemma2.init(small, jax.random.key(seed)).params(),
            Path(tokenizer_config.path),
        )
    convert(folder / "second", folder / "hf")
    return folder / "run", folder / "hf"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def exported(model: Path, folder: Path) -> dict[str, np.ndarray]:
    convert(model, folder, "huggingface", "float32")
    return tensors_of(folder)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that every matrix has several blocks."""
    monkeypatch.setattr(source_module, "BLOCK", 500)


def test_the_mean_of_models_of_different_kinds(others, run_folder, tmp_path):
    run, hf = others
    done = merge([run, hf, run_folder], tmp_path / "merged", "linear", [0.5, 0.3, 0.2])
    assert (done.target, done.dtype, done.source_dtypes) == (
        "huggingface",
        "float32",
        ("bfloat16", "float32"),
    )
    one, two, three = (exported(model, tmp_path / f"hf{n}") for n, model in enumerate((run, hf, run_folder)))
    found = tensors_of(tmp_path / "merged")
    assert found.keys() == one.keys()
    assert "lm_head.weight" not in found  # tied to the embedding
    for name in found:
        mean = np.float32(0.5) * one[name] + np.float32(0.3) * two[name] + np.float32(0.2) * three[name]
        np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)
    assert left(tmp_path / "merged") == left(tmp_path / "hf0")
    load(tmp_path / "merged")


def test_models_of_one_dtype_keep_it(exported_twice, tmp_path):
    """And the result in bfloat16 is that of arithmetic in bfloat16."""
    merge(exported_twice, tmp_path / "merged", "linear", [1, 3])
    one, two = map(tensors_of, exported_twice)
    found = tensors_of(tmp_path / "merged")["model.embed_tokens.weight"]
    a, b = one["model.embed_tokens.weight"], two["model.embed_tokens.weight"]
    total = (a.astype("float32") + (b * 3).astype("float32")).astype("bfloat16")
    np.testing.assert_array_equal(found, total / np.array(4, "bfloat16"))


@pytest.fixture(scope="module")
def exported_twice(run_folder, others, tmp_path_factory) -> list[Path]:
    """Two models in bfloat16, as Hugging Face folders."""
    folder = tmp_path_factory.mktemp("twice")
    convert(run_folder, folder / "a")
    convert(others[0], folder / "b", dtype="bfloat16")
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize(
    "method",
    ["ties", *(pytest.param(method, marks=pytest.mark.thorough) for method in ("slerp", "task"))],
)
def test_methods_with_a_base(method, others, run_folder, tmp_path):
    """A model merged with itself is itself, whatever the base, with whatever method keeps all of it."""
    run, hf = others
    weights = [0.5, 0.5] if method == "task" else None
    density = 1.0 if method == "ties" else None
    merge([run, run], tmp_path / "same", method, weights, hf, density)
    for name, tensor in exported(run, tmp_path / "run").items():
        np.testing.assert_allclose(tensors_of(tmp_path / "same")[name], tensor, rtol=1e-5, atol=1e-6)
    merge([run, run_folder], tmp_path / "merged", method, weights, hf)
    merged, base = tensors_of(tmp_path / "merged"), tensors_of(hf)
    assert all(np.isfinite(tensor).all() for tensor in merged.values())
    assert not np.array_equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    if method == "ties":  # most numbers of the base stay
        same = merged["model.embed_tokens.weight"] == base["model.embed_tokens.weight"]
        assert 0.6 < same.mean() < 0.8


def test_towards_the_base(others, tmp_path):
    run, hf = others
    merge([run], tmp_path / "half", "liti", [0.25], hf)
    tuned, base = exported(run, tmp_path / "run"), tensors_of(hf)
    for name, tensor in tensors_of(tmp_path / "half").items():
        np.testing.assert_allclose(tensor, 0.75 * base[name] + 0.25 * tuned[name], rtol=1e-5, atol=1e-6)


def test_deepmind_and_padding(small, params, others, tokenizer_config, tmp_path):
    """The padding rows of one model, and the stacked keys and values of another, do not disturb."""
    save(tmp_path / "dm", theirs(params, small, transposed=False, flat=True))
    rows = np.pad(np.asarray(params["embedder"]["embedding"]), ((0, 16), (0, 0)), constant_values=9)
    padded = replace(small, vocab_size=small.vocab_size + 16, vocab_padding=16)
    write_run(tmp_path / "padded", padded, {**params, "embedder": {"embedding": rows}}, tokenizer_config.path)
    done = merge(
        [tmp_path / "dm", tmp_path / "padded"], tmp_path / "run", "linear", None, kind="run",
        tokenizer_path=tokenizer_config.path,
    )  # fmt: skip
    assert done.target == "run"
    model, _ = load(tmp_path / "run", "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.params(), params)


def test_parts_are_read_alone(others, exported_twice, tmp_path, monkeypatch):
    """The embedding in blocks of rows, and one layer of a run's stack at a time."""
    whole = HuggingFaceSource.weight, RunSource.weight
    read = []

    def refuse(kind):
        def weight(self, place):
            assert place.path != "embedder/embedding"
            read.append(place)
            return kind(self, place)

        return weight

    for source, kind in zip((HuggingFaceSource, RunSource), whole, strict=True):
        monkeypatch.setattr(source, "weight", refuse(kind))
    merge([others[0], exported_twice[0]], tmp_path / "merged", "slerp")
    assert {place.pair for place in read} == {0, 1, None}
    run = open_source(others[0])
    assert isinstance(run, RunSource)
    for place in list(read):
        run.weight(place)
    assert not run._whole


@pytest.mark.thorough
def test_a_run_stored_in_whole_stacks(others, tokenizer_config, tmp_path, monkeypatch):
    """As older versions did."""
    params = load(others[0])[0].params()
    monkeypatch.setattr("gemma2_jax.checkpoints.store.storage_options", lambda path, array: None)
    source = open_source(others[0])
    write_run(tmp_path / "older", source.config, params, Path(tokenizer_config.path))
    convert(tmp_path / "older", tmp_path / "hf")
    found, expected = tensors_of(tmp_path / "hf"), exported(others[0], tmp_path / "expected")
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("method", "count", "options", "sentence"),
    [
        ("mean", 2, {}, "--method is 'mean'; accepted: linear, slerp, task, ties, liti."),
        ("linear", 1, {}, "--method linear merges at least 2 models, but 1 are given."),
        ("slerp", 3, {}, "--method slerp merges exactly 2 models, but 3 are given."),
        ("liti", 2, {"base": "base"}, "--method liti merges exactly 1 model, but 2 are given."),
        ("task", 2, {}, "--method task needs --base BASE"),
        ("linear", 2, {"base": "base"}, "--method linear has no base; leave out --base"),
        ("linear", 2, {"density": 0.5}, "--density is for --method ties, not linear"),
        ("ties", 2, {"base": "base", "density": 0.0}, "--density is 0.0; it must be above 0"),
        ("linear", 2, {"weights": [1.0]}, "--weights has 1 numbers for 2 models; give one per model."),
        ("linear", 2, {"weights": [1.0, -1.0]}, "--weights is 1 -1; their sum must not be 0"),
        ("linear", 2, {"weights": [1.0, float("nan")]}, "--weights is 1 nan; they must be finite"),
        ("slerp", 2, {"weights": [1.0, -0.5]}, "--weights is 1 -0.5; with --method slerp they must be at least 0."),
        ("liti", 1, {"base": "base"}, "--method liti needs --weights W, from 0"),
        ("liti", 1, {"base": "base", "weights": [1.5]}, "--weights is 1.5; with --method liti"),
        ("linear", 2, {"dtype": "q8_0"}, "dtype is 'q8_0'; accepted for a run or huggingface target"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_read(method, count, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma2_jax.formats.merge.open_source", None)
    with pytest.raises(UserError) as caught:
        merge(["model"] * count, "new", method, **options)
    assert str(caught.value).startswith(sentence)
    assert left(tmp_path) == []


def test_other_sizes(small, others, tokenizer_config, tmp_path):
    config = replace(small, d_ff=96)
    write_run(tmp_path / "wide", config, vivid(config).params(), Path(tokenizer_config.path))
    with pytest.raises(
        UserError, match=r"run holds a model with d_ff 64, but .*wide has 96, so .*; leave one"
    ):
        merge([others[0], tmp_path / "wide"], tmp_path / "new", "linear")
    assert left(tmp_path) == ["wide"]


def test_another_tokenizer(small, others, params, tokenizer_config, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(
        Path(tokenizer_config.path).read_bytes() + b"\xc0\x3e\x01"
    )  # with a field that no tool knows
    write_run(tmp_path / "run", small, params, other)
    with pytest.raises(
        UserError, match=r"has the tokenizer \w{12} of \d+ tokens, but .*run has \w{12} of .*--tokenizer"
    ):
        merge([others[0], tmp_path / "run"], tmp_path / "new", "linear")
    assert left(tmp_path) == ["other.model", "run"]
    merge([others[0], tmp_path / "run"], tmp_path / "new", "linear", tokenizer_path=tokenizer_config.path)


def test_an_interrupted_merge_leaves_nothing(others, tmp_path):
    def stop(stage, done, total):
        if stage == "verifying":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(others, tmp_path / "new", "linear", progress=stop)
    with pytest.raises(UserError, match="holds no checkpoint"):
        merge([others[0], tmp_path], tmp_path / "new", "linear")
    assert left(tmp_path) == []
