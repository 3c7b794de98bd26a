"""An adapter and its base: beside each other or merged, from our folders and PEFT's, and never with another base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.formats.adapter import AdaptedSource, read_adapter
from gemma2_jax.formats.based import check_base
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.inspection import inspect
from gemma2_jax.formats.load import adapted, load, model_of, open_source
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import TARGETS
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.formats.adapters import write_adapter
from tests.parameters import mostly_thorough

TOKENS = jnp.array([[2, 5, 9, 30, 7, 11, 4, 8]])
LORA = AdaptationConfig("lora", rank=4, alpha=6.0, dropout=0.1, targets=tuple(TARGETS))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(toy_run: RunConfig, small: ModelConfig) -> RunConfig:
    return replace(toy_run, model=small)


@pytest.fixture(scope="module")
def adapter(run: RunConfig, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter run whose base is a Hugging Face folder in bfloat16."""
    return write_adapter(run, exported, LORA, tmp_path_factory.mktemp("adapter") / "run")


@pytest.fixture(scope="module")
def partial(run: RunConfig, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of other rank and scale on some weights of some layers."""
    few = AdaptationConfig("lora", 2, 3.0, rslora=True, targets=("q", "o", "down"), layers=(1, 2))
    return write_adapter(run, exported, few, tmp_path_factory.mktemp("adapter") / "partial", seed=1)


@pytest.fixture(scope="module")
def peft(adapter: Path) -> Path:
    """The adapter as PEFT's folder; for reading only."""
    done = convert(adapter, adapter.parent / "peft", "peft")
    assert (done.target, done.dtype, done.weights) == ("peft", "float32", 2 * 7 * 4)
    return adapter.parent / "peft"


@pytest.fixture
def spoilt(peft: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(peft, tmp_path / "peft"))


def logits(model: Any) -> jax.Array:
    return jax.jit(model)(TOKENS)


@pytest.mark.thorough
def test_an_adapter_run_is_loaded_with_its_base(adapter: Path, exported: Path, tokenizer: Tokenizer) -> None:
    model, found = load(adapter)
    assert found.fingerprint == tokenizer.fingerprint
    base, _ = load(exported)
    assert jnp.abs(logits(model) - logits(base)).max() > 0.1
    mesh = build_mesh(MeshConfig(1, 4, 2))
    split = model_of(open_source(adapter), "float32", mesh)
    np.testing.assert_allclose(jax.jit(split)(TOKENS), logits(model), atol=1e-4)


@mostly_thorough("which", ["adapter", "partial"])
def test_merged_is_unmerged(which: str, request: Any, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    done = convert(folder, tmp_path / "merged", dtype="float32", merge=True)
    assert (done.target, done.source) == ("huggingface", "LoRA adapter on Hugging Face")
    expected = logits(load(folder)[0])
    found = logits(load(tmp_path / "merged")[0])
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max()


def test_the_merged_model_is_rounded_once_to_the_dtype_of_the_base(
    adapter: Path, exported: Path, tmp_path: Path
) -> None:
    convert(adapter, tmp_path / "merged", merge=True)
    name = "model.layers.1.self_attn.o_proj.weight"
    base, merged = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "merged"))
    assert {tensor.dtype.name for tensor in merged.values()} == {"bfloat16"}
    source = open_source(adapter)
    assert isinstance(source, AdaptedSource)
    ((a, b),) = (
        both
        for place, both in source.adapter.matrices.items()
        if (place.path, place.pair) == ("pairs/global_block/attention/output", 0)
    )
    N, H, _ = a.shape
    change = np.einsum("NHR,RD->DNH", a, b).reshape(-1, N * H) * (6.0 / 4)
    expected = (base[name].astype(np.float32) + change).astype(base[name].dtype)
    assert np.mean(merged[name] == expected) > 0.999  # float32 sums in another order may round differently
    np.testing.assert_array_equal(merged["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_the_merged_model_is_exported(adapter: Path, tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        pytest.importorskip("gguf")
    done = convert(adapter, tmp_path / f"merged.{kind}", kind, merge=True)
    assert done.target == kind


def test_an_adapter_is_not_converted_by_accident(adapter: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"run holds an adapter for {exported}; add --merge to write the complete"
    ):
        convert(adapter, tmp_path / "new")
    with pytest.raises(
        UserError, match=r"is a complete model, so there is nothing to merge; leave out --merge"
    ):
        convert(exported, tmp_path / "new", merge=True)
    with pytest.raises(UserError, match=r"is a complete model, which cannot become a PEFT adapter"):
        convert(exported, tmp_path / "new", "peft")
    with pytest.raises(UserError, match=r"a merged model is no adapter; leave out --merge"):
        convert(adapter, tmp_path / "new", "peft", merge=True)
    with pytest.raises(UserError, match=r"is a complete model, so it has no use for the base model"):
        open_source(exported, base=exported)
    assert not (tmp_path / "new").exists()


@mostly_thorough("which", ["adapter", "partial"])
def test_peft_holds_the_adapter_bit_for_bit(
    which: str, request: Any, small: ModelConfig, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(which)
    convert(folder, tmp_path / "peft", "peft")
    ours, theirs = read_adapter(folder, small), read_adapter(tmp_path / "peft", small)
    assert replace(ours.settings, dropout=0.0) == replace(theirs.settings, dropout=0.0)
    assert ours.identity == theirs.identity
    assert ours.matrices.keys() == theirs.matrices.keys()
    for place, both in ours.matrices.items():
        for one, other in zip(both, theirs.matrices[place], strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), np.ascontiguousarray(other).view(np.uint32))
    np.testing.assert_array_equal(logits(load(folder)[0]), logits(load(tmp_path / "peft")[0]))


def test_several_adapters_share_one_base(
    adapter: Path, partial: Path, exported: Path, small: ModelConfig
) -> None:
    base, _ = load(exported)
    for folder in (adapter, partial):
        model = adapted(base, read_adapter(folder, small))
        np.testing.assert_array_equal(logits(model), logits(load(folder)[0]))
        shared = model.params()["pairs"]["local_block"]["attention"]["query"].base
        assert shared is base.params()["pairs"]["local_block"]["attention"]["query"]


def test_inspect_shows_adapter_and_base(adapter: Path, partial: Path, exported: Path) -> None:
    found = inspect(partial, {})
    assert found.problems == []
    lines = dict(found.lines)
    assert lines["kind"] == "LoRA adapter on Hugging Face"
    assert "rank 2, scale 2.121, on q, o, down of layers 1, 2" in lines["adapter"]
    assert lines["base"].startswith(f"{exported}, whose weights were ")
    assert "on q, k, v, o, gate, up, down of all layers" in dict(inspect(adapter, {}).lines)["adapter"]


def test_an_adapter_for_another_base_is_refused(
    adapter: Path, run: RunConfig, run_folder: Path, exported: Path, small: ModelConfig, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    identity = json.loads((adapter / "base.json").read_text())["identity"][:12]
    message = rf"run was trained on a base model with the weights {identity}, but {other} has the weights"
    with pytest.raises(UserError, match=message):
        check_base(adapter, read_adapter(adapter, small).identity, open_source(other))
    with pytest.raises(UserError, match=message):
        convert(adapter, tmp_path / "new", merge=True, base=other)
    with pytest.raises(UserError, match=message):
        model_of(open_source(adapter, base=other), "float32")
    # The same weights in another format.
    check_base(adapter, read_adapter(adapter, small).identity, open_source(run_folder))
    open_source(adapter, base=run_folder).weight(next(iter(read_adapter(adapter, small).matrices)))


def test_an_adapter_is_a_base_of_another(adapter: Path, run: RunConfig, tmp_path: Path) -> None:
    second = write_adapter(run, adapter, replace(LORA, targets=("q",)), tmp_path / "second", seed=3)
    found = logits(load(second)[0])
    convert(adapter, tmp_path / "merged", dtype="float32", merge=True)
    expected = logits(load_with_base(second, tmp_path / "merged"))
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max()


def load_with_base(adapter: Path, base: Path) -> Any:
    return model_of(open_source(adapter, base=base), "float32")


def test_the_base_is_missing(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "run"))
    (folder / "base.json").write_text(json.dumps({"source": "gone", "identity": "0" * 64}))
    with pytest.raises(UserError, match=r"run was trained on the base model gone: gone does not exist"):
        open_source(folder)
    (folder / "base.json").write_text("[]")
    with pytest.raises(UserError, match=r"base.json is truncated or damaged"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_dora": True},
            r"adapter_config.json has use_dora true, which is not supported; merge it into its base",
        ),
        ({"modules_to_save": ["lm_head"]}, r'has modules_to_save \["lm_head"\], which is not supported'),
        ({"rank_pattern": {"q_proj": 2}}, r'has rank_pattern \{"q_proj": 2\}'),
        ({"bias": "all"}, r"has bias all, so it changes weights of the base model itself"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"has init_lora_weights pissa_niter_4, so it changes weights",
        ),
        ({"peft_type": "LOHA"}, r"has peft_type LOHA; accepted: LORA"),
        ({"r": "4"}, r"has r 4, lora_alpha 6 and lora_dropout 0.1; they must be numbers"),
        ({"r": 0}, r"has r 0, lora_alpha 6 and lora_dropout 0.1; they must be numbers, r at least 1"),
        ({"lora_alpha": float("nan")}, r"has r 4, lora_alpha nan and lora_dropout 0.1; they must be numbers"),
        ({"r": 8}, r"lora_A.weight of shape \[4, 64\], but the base model and rank 8 need \[8, 64\]"),
        (
            {"base_model_name_or_path": None},
            r"has no base_model_name_or_path; name the base model, as in gemma2 gen",
        ),
    ],
)
def test_other_settings_of_peft_are_refused(spoilt: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((spoilt / CONFIG).read_text())
    (spoilt / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        open_source(spoilt)


LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self_attn.q_proj.lora_A.weight", None, r"lacks .*layers.0.self_attn.q_proj.lora_A.weight"),
        (
            "self_attn.q_proj.lora_A.weight",
            "self_attn.q_proj.lora_magnitude_vector",
            r"holds .*lora_magnitude_vector, which adapts .*q_proj; accepted: the modules self_attn.q_proj",
        ),
        (
            "mlp.up_proj.lora_A.weight",
            "mlp.router.lora_A.weight",
            r"which adapts mlp.router; accepted: the modules",
        ),
        (
            "mlp.up_proj.lora_A.weight",
            "../../lm_head.lora_A.weight",
            r"lm_head.lora_A.weight, which adapts .*lm_head; accepted",
        ),
    ],
)
def test_modules_that_are_missing_or_unknown_are_named(
    spoilt: Path, old: str, new: str | None, message: str
) -> None:
    tensors = load_file(spoilt / WEIGHTS)
    tensor = tensors.pop(LAYER + old)
    if new is not None:
        tensors["base_model.model.lm_head.lora_A.weight" if "lm_head" in new else LAYER + new] = tensor
    save_file(tensors, spoilt / WEIGHTS)
    with pytest.raises(UserError, match=message):
        open_source(spoilt)


def test_a_layer_beyond_the_model_is_named(spoilt: Path) -> None:
    tensors = load_file(spoilt / WEIGHTS)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    tensors[name.format(9)] = tensors.pop(name.format(3))
    save_file(tensors, spoilt / WEIGHTS)
    with pytest.raises(
        UserError, match=r"layers.9.mlp.up_proj.lora_A.weight, but the base model has only 4 layers"
    ):
        open_source(spoilt)


def test_a_pickle_is_named(spoilt: Path) -> None:
    (spoilt / WEIGHTS).rename(spoilt / "adapter_model.bin")
    with pytest.raises(
        UserError, match=r"adapter_model.bin is a pickle, which may run code and cannot be read; save"
    ):
        open_source(spoilt)


def test_what_holds_no_adapter(exported: Path, small: ModelConfig) -> None:
    with pytest.raises(
        UserError, match=r"exported holds no adapter; accepted: a run folder of a training with adap"
    ):
        read_adapter(exported, small)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["adapter", "partial"])
def test_logits_are_those_of_peft(which: str, request: Any, exported: Path, tmp_path: Path) -> None:
    """PEFT's forward: each module's output plus lora_B(lora_A(x)) * scaling, by the module's name in the file."""
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    folder = request.getfixturevalue(which)
    convert(folder, tmp_path / "peft", "peft")
    tensors, config = (
        load_file(tmp_path / "peft" / WEIGHTS),
        json.loads((tmp_path / "peft" / CONFIG).read_text()),
    )
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="eager", dtype="float32"
    ).eval()

    def add(module: Any, inputs: Any, output: Any, a: Any, b: Any) -> Any:
        return output + torch.nn.functional.linear(torch.nn.functional.linear(inputs[0], a), b) * scaling

    for name, module in model.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in tensors:
            assert name.split(".")[-1] in config["target_modules"]
            a = torch.tensor(tensors.pop(key))
            b = torch.tensor(tensors.pop(key.replace("lora_A", "lora_B")))
            module.register_forward_hook(
                lambda module, inputs, output, a=a, b=b: add(module, inputs, output, a, b)
            )
    assert not tensors
    with torch.no_grad():
        expected = model(torch.tensor(np.array(TOKENS))).logits.numpy()
    found = logits(load(folder)[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore")
def test_peft_itself_reads_and_writes_our_adapters(peft: Path, exported: Path, tmp_path: Path) -> None:
    """Its logits are ours, and an adapter that it wrote is the same after import and export, bit for bit."""
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    library = pytest.importorskip("peft", reason="needs the extra `reference`")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            exported, attn_implementation="eager", dtype="float32"
        )

    def compare(model: Any, folder: Path) -> None:
        with torch.no_grad():
            expected = model.eval()(torch.tensor(np.array(TOKENS))).logits.numpy()
        found = logits(load(folder)[0])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    compare(library.PeftModel.from_pretrained(base(), peft), peft)
    modules = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    settings = library.LoraConfig(
        r=4, lora_alpha=10, use_rslora=True, target_modules=modules, layers_to_transform=[1, 3],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = library.get_peft_model(base(), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    compare(theirs, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.view(np.uint32), other[name].view(np.uint32))
    compare(library.PeftModel.from_pretrained(base(), tmp_path / "ours"), tmp_path / "theirs")
