"""Students cut out of a teacher: the right parts, consistently in all weights, without loss for unused parts."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.checkpoints.store import load_model
from gemma2_jax.config import UserError, build, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill import initialise
from gemma2_jax.distill.importance import BlockImportance, Importance, measure
from gemma2_jax.distill.initialise import InitConfig, choose, initial_params, select
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.layers import MLP
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, map_specs, weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.step import build_evaluation_step
from gemma2_jax.training.validation import averages, sum_over
from tests.parameters import mostly_thorough

BY_IMPORTANCE = InitConfig("teacher", layers="even", width="importance")
FIRST = InitConfig("teacher", layers="first", width="first")


def one_device() -> jax.sharding.Mesh:
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def random_batch(vocab_size: int, padding: int = 0) -> Batch:
    """Two documents per row, followed by tokens of padding."""
    B, T = 2, 24
    tokens = jax.random.randint(jax.random.key(5), (B, T), 0, vocab_size)
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), T // 2), (B, T))
    positions = jnp.broadcast_to(jnp.arange(T) % (T // 2), (B, T))
    fill = [(0, 0), (0, padding)]
    tokens = jnp.pad(tokens, fill, constant_values=3)
    segments, positions = jnp.pad(segments, fill), jnp.pad(positions, fill)
    return Batch(tokens, tokens, positions, segments, jnp.ones(tokens.shape))


def lively(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random weights with scales of norms that differ, as after training."""
    params = Gemma2.init(config, jax.random.key(seed)).params()
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def equal(left: Any, right: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), left, right)))


def widened(
    small: dict[str, Any], config: ModelConfig, wide: ModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same function in a wider model, its parts at random places among others that do nothing.

    Those are random wherever that makes no difference. And their number matters to the norms, which is made good
    in other weights than `select` would: the residual stream stays as it is.

    Returns:
        Parameters, and where the small model's parts are: D, and for each kind of block F, K and N.
    """
    draw = np.random.default_rng(0)
    K, G, P = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.num_pairs
    wide_G = wide.num_heads // wide.num_kv_heads

    def places(size: int, count: int) -> np.ndarray:
        return np.sort(draw.permutation(size)[:count])

    where: dict[str, Any] = {"D": places(wide.d_model, config.d_model)}
    for name in ("local_block", "global_block"):
        groups = np.stack([places(wide.num_kv_heads, K) for _ in range(P)])
        heads = np.stack(
            [np.concatenate([g * wide_G + places(wide_G, G) for g in of_pair]) for of_pair in groups]
        )
        neurons = np.stack([places(wide.d_ff, config.d_ff) for _ in range(P)])
        where[name] = {"F": neurons, "K": groups, "N": heads}

    growth = (wide.d_model / config.d_model) ** 0.5
    sizes = {path: leaf.shape for path, leaf in flat(abstract_params(weight_specs(wide))).items()}

    def grow(path: str, weight: Any) -> jax.Array:
        old = np.asarray(flat(small)[path])
        *_, part, name = path.split("/")
        if part.startswith(("pre_", "post_")):
            old = (1 + old) / growth - 1
        new = draw.normal(size=sizes[path])
        if name == "embedding":
            new, old = 0 * new, old / growth
        if name in ("output", "down"):
            unused = np.setdiff1d(np.arange(wide.d_model), where["D"])
            new[..., unused] = 0
        for pair in range(P) if weight.dims[0] == "P" else [None]:
            dims = weight.dims.removeprefix("P")
            kept = {"D": where["D"]} | (
                {} if pair is None else {d: index[pair] for d, index in where.get(block(path), {}).items()}
            )
            target = new if pair is None else new[pair]
            if name in ("value", "up"):  # of new groups and neurons
                axis = 1
                unused = np.setdiff1d(np.arange(target.shape[axis]), kept[dims[axis]])
                target[:, unused] = 0
            if name == "output":  # of new heads in old groups, which read old values
                in_old = np.isin(np.arange(wide.num_heads) // wide_G, kept["K"])
                target[in_old & ~np.isin(np.arange(wide.num_heads), kept["N"])] = 0
            index = np.ix_(
                *(kept.get(d, np.arange(size)) for d, size in zip(dims, target.shape, strict=True))
            )
            target[index] = old if pair is None else old[pair]
        return jnp.asarray(new, jnp.float32)

    return map_specs(grow, weight_specs(wide)), where


def block(path: str) -> str:
    return path.split("/")[1]


def flat(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


WIDER = dict(d_model=48, d_ff=80, num_heads=9, num_kv_heads=3)


@pytest.mark.thorough
@pytest.mark.parametrize("wider", [WIDER, *({name: size} for name, size in WIDER.items() if "heads" not in name),
                                   dict(num_heads=6), dict(num_heads=6, num_kv_heads=3)])  # fmt: skip
def test_what_does_nothing_is_found_and_can_go(toy_config: ModelConfig, wider: dict[str, int]) -> None:
    wide = replace(toy_config, **wider)
    small = lively(toy_config)
    params, where = widened(small, toy_config, wide)
    batch = random_batch(toy_config.vocab_size)
    importance = measure(Gemma2(wide, params), [batch], one_device())
    choice = choose(BY_IMPORTANCE, wide, toy_config, importance)
    np.testing.assert_array_equal(choice.channels, where["D"])
    for name in ("local_block", "global_block"):
        for letter, index in where[name].items():
            np.testing.assert_array_equal(choice.blocks[name][letter], index, f"{name} {letter}")

    student = jax.jit(select, static_argnames=("teacher", "student"))(
        params, teacher=wide, student=toy_config, choice=choice
    )

    def read(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
        return Gemma2(config, params)(batch.tokens, batch.positions, batch.segment_ids)

    wanted = read(toy_config, small)
    assert float(jnp.std(wanted)) > 1
    np.testing.assert_allclose(read(wide, params), wanted, atol=1e-4)  # or else the test itself is wrong
    np.testing.assert_allclose(read(toy_config, student), wanted, atol=1e-4)


@pytest.mark.thorough
def test_norms_see_the_mean_square_that_they_saw(toy_config: ModelConfig) -> None:
    """With an epsilon that is not small compared with the mean square."""
    teacher = replace(toy_config, **WIDER, norm_eps=0.5)
    student = replace(toy_config, norm_eps=0.5)
    params, _ = widened(lively(student), student, teacher)
    batch = random_batch(toy_config.vocab_size)
    choice = choose(BY_IMPORTANCE, teacher, student, measure(Gemma2(teacher, params), [batch], one_device()))
    cut = Gemma2(student, select(params, teacher, student, choice))
    np.testing.assert_allclose(cut(batch.tokens), Gemma2(teacher, params)(batch.tokens), atol=1e-4)


def test_equal_sizes_keep_every_bit(toy_config: ModelConfig) -> None:
    params = lively(toy_config)
    importance = measure(Gemma2(toy_config, params), [random_batch(toy_config.vocab_size)], one_device())
    for config, measured in [(FIRST, None), (BY_IMPORTANCE, importance), (InitConfig("teacher"), None)]:
        choice = choose(config, toy_config, toy_config, measured)
        assert equal(select(params, toy_config, toy_config, choice), params)


@mostly_thorough(
    ("layers", "pairs", "kept"),
    [
        ("first", 3, [0, 1, 2]),
        ("even", 1, [0]),
        ("even", 2, [0, 5]),
        ("even", 3, [0, 2, 5]),
        ("even", 4, [0, 2, 3, 5]),
        ("even", 6, [0, 1, 2, 3, 4, 5]),
        ((1, 4), 2, [1, 4]),
    ],
)
def test_pairs_of_layers_stay_whole(
    toy_config: ModelConfig, layers: Any, pairs: int, kept: list[int]
) -> None:
    teacher, student = replace(toy_config, num_layers=12), replace(toy_config, num_layers=2 * pairs)
    params = lively(teacher)
    chosen = select(params, teacher, student, choose(InitConfig("teacher", layers), teacher, student))
    assert equal(chosen["pairs"], jax.tree.map(lambda stack: stack[np.array(kept)], params["pairs"]))
    assert equal(chosen["embedder"], params["embedder"])
    assert equal(chosen["final_norm"], params["final_norm"])


def test_removed_parts_do_not_affect_the_choice_of_channels(toy_config: ModelConfig) -> None:
    """Channel 9 matters to a pair that is removed, channel 7 a little to the pair that is kept."""
    teacher, student = toy_config, replace(toy_config, num_layers=2, d_model=1)
    channels = np.zeros((2, 32))
    channels[1, 9], channels[0, 7] = 5, 1
    of_block = BlockImportance(channels, np.ones((2, 64)), np.ones((2, 4)))
    importance = Importance({"local_block": of_block, "global_block": of_block}, np.zeros(32))
    config = InitConfig("teacher", layers="first", width="importance")
    assert choose(config, teacher, student, importance).channels.tolist() == [7]
    config = replace(config, layers=(1,))
    assert choose(config, teacher, student, importance).channels.tolist() == [9]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kept_groups", "kept_heads"),
    [
        (2, 2, [0, 1], [0, 3]),  # the better query head of each group
        (2, 1, [1], [2, 3]),  # the better group as a whole, though head 0 is the best of all
        (1, 1, [0], [0]),  # the group whose one head is better
    ],
)
def test_query_heads_stay_with_their_group(
    toy_config: ModelConfig, heads: int, kv_heads: int, kept_groups: list[int], kept_heads: list[int]
) -> None:
    of_block = BlockImportance(np.ones((2, 32)), np.ones((2, 64)), np.array([[5.0, 0.0, 3.0, 4.0]] * 2))
    importance = Importance({"local_block": of_block, "global_block": of_block}, np.ones(32))
    student = replace(toy_config, num_heads=heads, num_kv_heads=kv_heads)
    choice = choose(BY_IMPORTANCE, toy_config, student, importance)
    params = lively(toy_config)
    chosen = select(params, toy_config, student, choice)
    for name in ("local_block", "global_block"):
        theirs, ours = params["pairs"][name]["attention"], chosen["pairs"][name]["attention"]
        for weight in ("key", "value"):
            assert np.array_equal(ours[weight], theirs[weight][:, :, np.array(kept_groups)])
        assert np.array_equal(ours["query"], theirs["query"][:, :, np.array(kept_heads)])
        assert np.array_equal(ours["output"], theirs["output"][:, np.array(kept_heads)])


@pytest.mark.thorough
def test_activations_are_those_of_the_model(toy_config: ModelConfig) -> None:
    """Each number on its own, from the model's modules; padding does not count."""
    teacher = Gemma2(toy_config, lively(toy_config))
    batch = random_batch(toy_config.vocab_size)
    importance = measure(teacher, [batch, batch], one_device())
    padded = measure(teacher, [random_batch(toy_config.vocab_size, padding=7)], one_device())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), importance, padded)

    hidden = teacher.hidden(batch.tokens, batch.positions, batch.segment_ids)
    np.testing.assert_allclose(importance.final, jnp.abs(hidden).mean((0, 1)), rtol=1e-4)

    local = jax.tree.map(lambda stack: stack[0], teacher.params()["pairs"]["local_block"])
    first = jax.tree.map(lambda stack: stack[0], teacher.pairs).local_block
    found = jax.tree.map(lambda stack: stack[0], importance.blocks["local_block"])
    x = teacher.embedder.encode(batch.tokens, jnp.float32)
    attention_input = first.pre_attention_norm(x)
    for head in range(toy_config.num_heads):
        alone = local["attention"]["output"] * (jnp.arange(toy_config.num_heads) == head)[:, None, None]
        attention = Attention({**local["attention"], "output": alone}, toy_config, toy_config.sliding_window)
        added, _ = attention(attention_input, batch.positions, batch.segment_ids)
        assert found.heads[head] == pytest.approx(float(jnp.linalg.norm(added, axis=-1).mean()), rel=1e-4)
    mixed, _ = first.attention(attention_input, batch.positions, batch.segment_ids)
    mlp_input = first.pre_mlp_norm(x + first.post_attention_norm(mixed))
    neurons = MLP(local["mlp"]).neurons(mlp_input)
    added = jnp.abs(neurons).mean((0, 1)) * jnp.linalg.norm(local["mlp"]["down"], axis=1)
    np.testing.assert_allclose(found.neurons, added, rtol=1e-4)
    channels = jnp.abs(attention_input).mean((0, 1)) + jnp.abs(mlp_input).mean((0, 1))
    np.testing.assert_allclose(found.channels, channels, rtol=1e-4)


@pytest.fixture(scope="module")
def teacher(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A trained teacher, larger than the student in everything."""
    config = replace(
        toy_run,
        output=str(tmp_path_factory.mktemp("runs") / "teacher"),
        model=replace(toy_run.model, num_layers=4, d_model=48, d_ff=96, num_heads=8, num_kv_heads=4),
        mesh=MeshConfig(2, 2, 2),
        training=replace(toy_run.training, steps=20, eval_every=20),
        checkpoint=replace(toy_run.checkpoint, every=20),
    )
    train(config)
    return config


@pytest.mark.thorough
def test_a_student_begins_ahead(teacher: RunConfig, toy_run: RunConfig, tokenizer: Tokenizer) -> None:
    mesh = one_device()

    def loss(model: ModelConfig, params: dict[str, Any]) -> float:
        step = build_evaluation_step(build_method(replace(toy_run, model=model)))
        batches = validation_batches(toy_run.data)
        with jax.set_mesh(mesh):
            sums = sum_over(partial(step, {"params": params}, {}), batches, mesh)
        return averages(sums)["cross_entropy"]

    def begun(model: ModelConfig, **choice: Any) -> float:
        batches = (on_mesh(batch, mesh) for batch in train_batches(toy_run.data))
        config = InitConfig(teacher.output, **choice)
        return loss(model, initial_params(config, model, tokenizer, mesh, batches))

    whole = loss(teacher.model, load_model(teacher.output).params())
    random = loss(toy_run.model, Gemma2.init(toy_run.model, jax.random.key(0)).params())
    cut = begun(toy_run.model, layers="even", width="importance")
    assert whole < cut < 0.7 * random
    assert cut < begun(toy_run.model, layers="even", width="first")


@pytest.mark.thorough
def test_the_mesh_does_not_matter(teacher: RunConfig, toy_run: RunConfig, tokenizer: Tokenizer) -> None:
    """The student is sharded as its run needs. Its vocabulary has rows of padding, its teacher's has none."""
    student = replace(toy_run.model, vocab_size=416, vocab_padding=16)
    config = InitConfig(teacher.output, layers="even", width="importance", batches=2)

    def cut(mesh: jax.sharding.Mesh) -> dict[str, Any]:
        batches = (on_mesh(batch, mesh) for batch in train_batches(toy_run.data))
        return initial_params(config, student, tokenizer, mesh, batches)

    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):  # as in a run
        sharded = cut(mesh)
    assert equal(sharded, cut(one_device()))
    wanted = abstract_params(weight_specs(student), mesh=mesh)
    jax.tree.map(lambda leaf, target: leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim) or pytest.fail(
        f"{leaf.sharding} is not {target.sharding}"), sharded, wanted)  # fmt: skip


@pytest.mark.thorough
def test_the_same_model_is_loaded_unchanged(teacher: RunConfig, tokenizer: Tokenizer) -> None:
    """With or without settings for the choice; no batch is read."""
    whole = load_model(teacher.output).params()
    for config in (InitConfig(teacher.output), InitConfig(teacher.output, "even", "importance")):
        assert equal(initial_params(config, teacher.model, tokenizer, one_device(), []), whole)


@pytest.mark.parametrize(
    ("changed", "choice", "sentence"),
    [
        (dict(d_model=64), {}, r"teacher has d_model 32, but model.d_model is 64; choose a source that"),
        (dict(num_layers=6), {}, r"teacher has num_layers 4, but model.num_layers is 6; choose a source that"),
        (dict(num_heads=8, num_kv_heads=4), {}, r"has num_heads 4, but model.num_heads is 8; choose a source that"),
        (dict(head_dim=4), {}, r"teacher has head_dim 8, but model.head_dim is 4; both .*, since RoPE's"),
        (dict(sliding_window=4), {}, r"teacher has sliding_window 8, but model.sliding_window is 4; both must"),
        (dict(global_every=2), {}, r"teacher has global_every 1, but model.global_every is 2; both must"),
        (dict(vocab_size=64), {}, r"teacher has vocab_size 97, but model.vocab_size is 64; both must"),
        (
            dict(num_heads=4, num_kv_heads=1),
            {},
            r"has 2 query heads for each key/value head \(4 for 2\), but the model has 4 \(4 for 1\); choose",
        ),
        (dict(num_layers=2), dict(layers=(2,)), r"layers names pair 2, but .* teacher has pairs 0 to 1\.$"),
        (dict(num_layers=2), dict(layers=(0, 1)), r"layers names 2 pairs .*, but model.num_layers=2 needs 1 pairs"),
        (dict(num_layers=2), dict(layers=None), r"has num_layers 4, but model.num_layers is 2; set initialise.layers"),
        (dict(d_ff=32), dict(width=None), r"teacher has d_ff 64, but model.d_ff is 32; set initialise.width"),
    ],
)  # fmt: skip
def test_no_part_of_the_teacher_is_refused(
    toy_config: ModelConfig, changed: dict[str, int], choice: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        choose(replace(FIRST, **choice), toy_config, replace(toy_config, **changed))
    assert str(refused.value).startswith("initialise.")
    assert "\n" not in str(refused.value)


@pytest.mark.thorough
def test_refused_before_the_weights_are_read(
    teacher: RunConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialise, "load_params", lambda *_: pytest.fail("the weights are read"))
    student = replace(teacher.model, d_ff=128)
    found = f"^initialise.source {teacher.output} has d_ff 96, but model.d_ff is 128; "
    with pytest.raises(UserError, match=found):
        initial_params(InitConfig(teacher.output, width="first"), student, tokenizer, one_device(), [])


@pytest.mark.thorough
def test_another_vocabulary_is_refused(teacher: RunConfig, toy_run: RunConfig, tokenizer: Tokenizer) -> None:
    student = replace(toy_run.model, vocab_size=500)
    with pytest.raises(UserError, match="holds a model with 400 tokens, but the configuration has 500"):
        initial_params(InitConfig(teacher.output, "even", "first"), student, tokenizer, one_device(), [])


@pytest.mark.thorough
def test_a_mesh_that_does_not_divide_the_source(teacher: RunConfig, tokenizer: Tokenizer) -> None:
    """The mesh does divide the student, which has other sizes."""
    mesh = build_mesh(MeshConfig(data=1, fsdp=5), jax.devices()[:5])
    student = replace(teacher.model, d_model=40)
    found = rf"fsdp is 5, which does not divide dimension D \(48\) of initialise.source {teacher.output} "
    with pytest.raises(UserError, match=found):
        initial_params(InitConfig(teacher.output, width="first"), student, tokenizer, mesh, [])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (dict(layers="last"), r"layers is \"last\"; accepted: first or even or a list of a whole number or null"),
        (dict(layers=[1, 0]), r"initialise.layers is \[1, 0\]; it must be a list of different pair"),
        (dict(layers=[-1, 0]), r"initialise.layers is \[-1, 0\]; it must be a list of different pair"),
        (dict(width="random"), r"width is \"random\"; accepted: first or importance or null"),
        (dict(batches=0), r"initialise.batches is 0; it must be at least 1"),
        (dict(source=None, layers="even"), r"initialise.layers is even, but initialise.source is null"),
        (dict(source=None, width="first"), r"initialise.width is first, but initialise.source is null"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(InitConfig, {"source": "runs/teacher", **data}, "the command line")


def test_a_list_of_pairs_in_a_file() -> None:
    config = build(InitConfig, {"source": "runs/teacher", "layers": [0, 2]}, "file.yaml")
    assert config == InitConfig("runs/teacher", (0, 2))
    assert build(InitConfig, to_dict(config), "file.yaml") == config
