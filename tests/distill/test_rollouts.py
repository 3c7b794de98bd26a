"""On-policy batches: sampled completions, the targets that count, and equality on every mesh."""

import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.stages import Wrapped

from gemma2_jax.checkpoints.store import CONFIG_FILE, TOKENIZER_FILE, save_params
from gemma2_jax.config import UserError, build, save_config, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig, MixtureSource
from gemma2_jax.data.packing import PackedRows
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rollouts import OnPolicyConfig, completion_stops, lay_out, on_policy_steps, rollout
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, abstract_params, weight_specs
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.objectives.terms import forward_kl, jsd, reverse_kl
from gemma2_jax.run import RunConfig
from gemma2_jax.sampling.choice import TokenChoice
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.decoding import row_keys
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.sharding.layout import batch_sharding, on_mesh
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training import trainer
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from tests.steps import take_steps

B, T, PROMPT = 8, 32, 10
LENGTHS = [3, 10, 10, 1, 10, 7, 10, 10]  # of the prompts: the first document of a row, but at most PROMPT
GREEDY = 1e-6  # a temperature at which only the likeliest token is drawn
NEVER = 400  # a stop token that is none, since there are 400
ONE_DEVICE = MeshConfig(1, 1, 1)


@pytest.fixture(scope="session")
def student(toy_run: RunConfig) -> Gemma2:
    return Gemma2.init(toy_run.model, jax.random.key(0))


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Rows of several documents each, cut after LENGTHS or after 20 tokens."""
    draw = np.random.default_rng(0)
    firsts = np.array([length if length < PROMPT else 20 for length in LENGTHS])[:, None]
    place = np.arange(T)[None]
    segment_ids = 1 + (place >= firsts) + (place >= 28).astype(np.int32)
    tokens = draw.integers(6, 390, (B, T)).astype(np.int32)
    positions = place - np.where(place >= 28, 28, np.where(place >= firsts, firsts, 0))
    mask = np.ones((B, T), np.float32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), positions.astype(np.int32), segment_ids, mask)


@cache
def rollout_of(
    config: OnPolicyConfig, model: ModelConfig, stop: int, mesh: Mesh, unroll_layers: bool
) -> Wrapped:
    """Cached, so that tests do not trace it again."""
    compute = ComputeConfig(unroll_layers=unroll_layers)

    def sampled(params: Params, batch: Batch, step: jax.Array) -> Batch:
        return rollout(config, model, compute, params, batch, 0, step, (stop,))

    return jax.jit(sampled, out_shardings=batch_sharding(mesh))


def sample(
    model: Gemma2,
    batch: Batch,
    temperature: float = 1.0,
    step: int = 0,
    stop: int = NEVER,
    mesh_config: MeshConfig = ONE_DEVICE,
    unroll_layers: bool = False,
) -> Batch:
    """The rollout of a batch, on as many devices as the mesh has."""
    mesh = build_mesh(mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor])
    config = OnPolicyConfig(0.5, PROMPT, temperature)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, abstract_params(weight_specs(model.config), mesh=mesh)
        )
        params = jax.device_put(model.params(), shardings)
        sampled = rollout_of(config, model.config, stop, mesh, unroll_layers)
        found: Batch = sampled(params, on_mesh(batch, mesh), np.int32(step))
    return found


@pytest.fixture(scope="session")
def greedy(student: Gemma2, batch: Batch) -> Batch:
    return jax.tree.map(np.asarray, sample(student, batch, GREEDY))


@pytest.fixture(scope="session")
def rolled(student: Gemma2, batch: Batch) -> Batch:
    """Drawn at temperature 1; some rows end early, at a token that they are likely to hold."""
    whole = sample(student, batch)
    stop = int(np.bincount(np.asarray(whole.targets)[np.asarray(whole.loss_mask) > 0]).argmax())
    ended: Batch = jax.tree.map(np.asarray, sample(student, batch, stop=stop))
    assert 0 < np.sum(ended.segment_ids[:, -1] == 0) < B
    return ended


def new_tokens(batch: Batch) -> list[list[int]]:
    """The targets that count, row by row."""
    return [row[mask > 0].tolist() for row, mask in zip(batch.targets, batch.loss_mask, strict=True)]


def test_the_layout_of_hand_made_rows() -> None:
    """A short prompt; a stop at once; a stop in the middle; one at the very end; one too late to be seen."""
    prompts = jnp.array([[5, 0, 0], [5, 6, 7], [5, 6, 0], [5, 6, 7], [5, 6, 7]])
    new = jnp.array(
        [[11, 12, 13, 14, 15], [1, 9, 9, 9, 9], [11, 12, 1, 9, 1], [11, 12, 1, 9, 9], [11, 12, 13, 1, 9]]
    )
    found = lay_out(prompts, jnp.array([1, 3, 2, 3, 3]), new, jnp.array([1]))
    expected = Batch(
        tokens=[
            [5, 11, 12, 13, 14],
            [5, 6, 7, 0, 0],
            [5, 6, 11, 12, 0],
            [5, 6, 7, 11, 12],
            [5, 6, 7, 11, 12],
        ],
        targets=[
            [11, 12, 13, 14, 15],
            [6, 7, 1, 0, 0],
            [6, 11, 12, 1, 0],
            [6, 7, 11, 12, 1],
            [6, 7, 11, 12, 13],
        ],
        positions=[[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
        segment_ids=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        loss_mask=[[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]],
    )
    for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask"):
        assert getattr(found, name).tolist() == getattr(expected, name), name
        assert getattr(found, name).dtype == (jnp.float32 if name == "loss_mask" else jnp.int32)


@pytest.mark.parametrize("length", [T + 1, 20])
def test_a_row_is_what_packing_makes_of_the_same_document(length: int) -> None:
    document = np.arange(2, length + 2)
    document[-1] = 1  # the end of text
    source = grain.MapDataset.source([document]).to_iter_dataset(grain.ReadOptions(num_threads=0))
    (row,) = PackedRows(source, T)
    row["loss_mask"][: PROMPT - 1] = 0  # the prompt's own tokens, of which the student sampled none
    new = np.full((1, T), 9)
    new[0, : length - PROMPT] = document[PROMPT:]
    found = lay_out(jnp.array(document[None, :PROMPT]), jnp.array([PROMPT]), jnp.array(new), jnp.array([1]))
    for name, expected in row.items():
        np.testing.assert_array_equal(getattr(found, name)[0], expected, name)


def test_every_kind_of_source_adds_its_stop(
    data: DataConfig, conversations: DataConfig, tokenizer: Tokenizer
) -> None:
    text, turns = MixtureSource(data.source, 1.0), MixtureSource(conversations.source, 1.0, "conversations")
    both = replace(conversations, source=(), mixture=(text, turns))
    assert completion_stops(data, tokenizer) == (tokenizer.eos_id,)
    assert completion_stops(conversations, tokenizer) == (tokenizer.end_of_turn_id,)
    assert completion_stops(both, tokenizer) == (tokenizer.eos_id, tokenizer.end_of_turn_id)
    assert completion_stops(replace(both, mixture=(text,)), tokenizer) == (tokenizer.eos_id,)


def test_any_of_several_stops_ends_a_completion() -> None:
    new = jnp.array([[11, 2, 9, 1, 9], [11, 12, 1, 2, 9]])
    found = lay_out(jnp.array([[5], [5]]), jnp.array([1, 1]), new, jnp.array([1, 2]))
    assert new_tokens(found) == [[11, 2], [11, 12, 1]]


def test_prompts_of_conversations_end_before_the_first_target_with_loss(
    student: Gemma2, batch: Batch, greedy: Batch
) -> None:
    mask = batch.loss_mask.copy()
    mask[1, :4], mask[2, : PROMPT - 1], mask[4, :PROMPT] = 0, 0, 0
    found = jax.tree.map(np.asarray, sample(student, replace(batch, loss_mask=mask), GREEDY))
    lengths = {1: 5, 2: PROMPT}
    for row, length in lengths.items():
        np.testing.assert_array_equal(found.tokens[row, :length], batch.tokens[row, :length])
        assert found.loss_mask[row].tolist() == [0.0] * (length - 1) + [1.0] * (T + 1 - length)
    assert not found.loss_mask[4].any()  # its prompt is longer than PROMPT
    for row in set(range(B)) - {1, 4}:
        np.testing.assert_array_equal(found.targets[row], greedy.targets[row])


def test_prompts_are_the_beginnings_of_the_first_documents(batch: Batch, greedy: Batch) -> None:
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(greedy.tokens[row, :length], batch.tokens[row, :length])
        assert greedy.loss_mask[row].tolist() == [0.0] * (length - 1) + [1.0] * (T + 1 - length)
    np.testing.assert_array_equal(greedy.tokens[:, 1:], greedy.targets[:, :-1])
    np.testing.assert_array_equal(greedy.positions, np.broadcast_to(np.arange(T), (B, T)))
    np.testing.assert_array_equal(greedy.segment_ids, 1)


@pytest.mark.parametrize("ends", [False, True], ids=["full", "ending"])
def test_greedy_samples_are_the_samplers(
    student: Gemma2, tokenizer: Tokenizer, batch: Batch, greedy: Batch, ends: bool
) -> None:
    stop = greedy.targets[1, 20] if ends else NEVER
    found = jax.tree.map(np.asarray, sample(student, batch, GREEDY, stop=int(stop)))
    prompts = [row[:length].tolist() for row, length in zip(batch.tokens, LENGTHS, strict=True)]
    config = SamplingConfig(max_new_tokens=T, temperature=0.0, stop_tokens=(int(stop),))
    expected = Sampler(student, tokenizer).generate_tokens(prompts, config)
    assert new_tokens(found) == [
        row[: T + 1 - len(prompt)] for row, prompt in zip(expected, prompts, strict=True)
    ]
    assert any(len(row) < T + 1 - length for row, length in zip(expected, LENGTHS, strict=True)) == ends


@pytest.mark.thorough
@pytest.mark.parametrize("unroll_layers", [False, True])
def test_tokens_are_drawn_from_the_full_forwards_logits(
    student: Gemma2, batch: Batch, unroll_layers: bool
) -> None:
    """Each token uses the noise of its step, row and position."""
    found = sample(student, batch, 0.7, step=5, unroll_layers=unroll_layers)
    keys = row_keys(jax.random.fold_in(jax.random.key(0), 5), B)

    @jax.jit
    def drawn(tokens: jax.Array) -> jax.Array:
        logits = student(tokens)

        def at(place: jax.Array) -> jax.Array:
            return TokenChoice(0.7)(
                logits[:, place], jax.vmap(partial(jax.random.fold_in, data=place + 1))(keys)
            )

        return jax.lax.map(at, jnp.arange(T)).T

    sampled = np.asarray(found.loss_mask) > 0
    np.testing.assert_array_equal(found.targets[sampled], drawn(found.tokens)[sampled])


@pytest.mark.thorough
def test_samples_follow_the_students_distribution(toy_config: ModelConfig, toy_model: Gemma2) -> None:
    """20,000 rows with the same prompt of two tokens: the first token's frequencies, and the surprise of all."""
    rows = 20_000
    tokens = np.tile(np.array([[2, 40, 7, 7]], np.int32), (rows, 1))
    segments = np.tile(np.array([[1, 1, 2, 2]], np.int32), (rows, 1))
    batch = Batch(tokens, tokens, segments * 0, segments, segments * np.float32(1))
    found = sample(toy_model, batch)
    log_p = np.asarray(jax.jit(lambda tokens: jax.nn.log_softmax(toy_model(tokens)))(found.tokens))

    expected = np.exp(log_p[0, 1])
    share = np.bincount(found.targets[:, 1], minlength=toy_config.vocab_size) / rows
    deviations = (share - expected) / np.sqrt(expected * (1 - expected) / rows)
    assert np.max(np.abs(deviations)) < 5  # each of 97 exceeds it by chance in 1 of 2 million cases

    # -log p - H has mean 0 at each place, whatever came before.
    p, surprise = np.exp(log_p[:, 1:]), -log_p[:, 1:]
    entropy = np.sum(p * surprise, axis=-1)
    variance = np.sum(p * surprise**2, axis=-1) - entropy**2
    found_surprise = np.take_along_axis(surprise, np.asarray(found.targets)[:, 1:, None], axis=-1)[..., 0]
    deviation = np.sum(found_surprise - entropy) / np.sqrt(np.sum(variance))
    assert abs(deviation) < 4


def test_steps_and_rows_differ_and_repeat(student: Gemma2, batch: Batch) -> None:
    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), batch)
    first, second = sample(student, same, step=1), sample(student, same, step=2)
    assert len(np.unique(first.tokens, axis=0)) == B
    assert not np.any(np.all(np.asarray(first.tokens) == np.asarray(second.tokens), axis=1))
    chex.assert_trees_all_equal(sample(student, same, step=1), first)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(8, 1, 1)], ids=["all-three", "fsdp", "data"]
)
def test_the_same_tokens_on_every_mesh(student: Gemma2, batch: Batch, mesh: MeshConfig) -> None:
    one, eight = sample(student, batch, step=3), sample(student, batch, step=3, mesh_config=mesh)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, eight), jax.tree.map(np.asarray, one))
    for leaf in jax.tree.leaves(eight):
        assert leaf.sharding.is_equivalent_to(batch_sharding(build_mesh(mesh)), leaf.ndim)


@pytest.mark.thorough
def test_the_loss_is_the_divergence_on_the_students_own_tokens(
    toy_run: RunConfig, student: Gemma2, rolled: Batch
) -> None:
    """Computed from all logits at once; what follows the end of a row has no part in it."""
    teacher = Gemma2.init(replace(toy_run.model, d_model=48, num_layers=4), jax.random.key(7))
    objective = ObjectiveConfig(0.0, 0.25, 1.0, 48, reverse_kl=0.25, jsd=0.5, jsd_beta=0.3)
    distill = DistillConfig("given to the step", "float32", model=teacher.config)
    run = replace(toy_run, objective=objective, distill=distill)
    mesh = build_mesh(ONE_DEVICE, jax.devices()[:1])

    @jax.jit
    def divergences(tokens: jax.Array) -> dict[str, jax.Array]:
        s, t = student(tokens), teacher(tokens)
        return {"kl": forward_kl(s, t, 1.0), "reverse_kl": reverse_kl(s, t, 1.0), "jsd": jsd(s, t, 1.0, 0.3)}

    after = rolled.segment_ids == 0
    garbage: dict[str, Any] = {
        name: np.where(after, 50, getattr(rolled, name)) for name in ("tokens", "targets", "positions")
    }
    row, same = (
        take_steps(run, mesh, [batch], teacher)[1][0] for batch in (rolled, replace(rolled, **garbage))
    )
    assert row["targets"] == sum(map(len, new_tokens(rolled))) < (1 - np.mean(after)) * B * T
    expected = {
        name: float(np.sum(value * rolled.loss_mask) / rolled.loss_mask.sum())
        for name, value in divergences(rolled.tokens).items()
    }
    expected["loss"] = 0.25 * expected["kl"] + 0.25 * expected["reverse_kl"] + 0.5 * expected["jsd"]
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    assert same == pytest.approx(row, rel=1e-6)


@pytest.mark.thorough
def test_a_run_on_eight_devices_is_that_on_one(
    toy_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on samples; the second samples from the student that the first has updated."""
    teacher = replace(toy_run, output=str(tmp_path / "teacher"), model=replace(toy_run.model, d_model=48))
    save_config(teacher, tmp_path / "teacher" / CONFIG_FILE)
    shutil.copy(toy_run.tokenizer.path, tmp_path / "teacher" / TOKENIZER_FILE)
    save_params(teacher.output, Gemma2.init(teacher.model, jax.random.key(7)).params(), to_dict(teacher))
    run = replace(
        toy_run,
        objective=ObjectiveConfig(0.0, 0.0, 1.0, 48, jsd=1.0),
        distill=DistillConfig(teacher.output, "float32", on_policy=OnPolicyConfig(1.0, PROMPT)),
        training=replace(toy_run.training, steps=2, eval_every=2),
        optimizer=replace(toy_run.optimizer, warmup_steps=0),
    )
    monkeypatch.setattr(trainer.Trainer, "_evaluate_if_due", lambda *_: None)  # not what this is about
    train(replace(run, output=str(tmp_path / "eight"), mesh=MeshConfig(2, 2, 2)))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    train(replace(run, output=str(tmp_path / "one")))
    one, eight = (read_metrics(tmp_path / name)[:2] for name in ("one", "eight"))
    for expected, found in zip(one, eight, strict=True):
        assert found["on_policy"] == 1
        assert found["jsd"] == pytest.approx(expected["jsd"], rel=1e-5)
        of_samples = "sampled_cross_entropy"  # of the same tokens
        assert found[of_samples] == pytest.approx(expected[of_samples], rel=1e-5)


def test_rows_end_with_the_stop_token(rolled: Batch) -> None:
    ended = np.flatnonzero(rolled.segment_ids[:, -1] == 0)
    (stop,) = {int(rolled.targets[row][rolled.loss_mask[row] > 0][-1]) for row in ended}
    for row, tokens in enumerate(new_tokens(rolled)):
        assert tokens.count(stop) == (tokens[-1] == stop)
        assert (tokens[-1] == stop) >= (row in ended)
    assert not np.any(rolled.loss_mask[rolled.segment_ids == 0])
    assert not np.any(rolled.tokens[rolled.segment_ids == 0])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_configured_fraction_of_steps(fraction: float) -> None:
    share = np.mean(on_policy_steps(OnPolicyConfig(fraction, 1), 0, 10_000))
    assert share == pytest.approx(fraction, abs=4 * np.sqrt(fraction * (1 - fraction) / 10_000))


def test_steps_follow_a_schedule() -> None:
    fraction = ScheduleConfig("wsd", start=0.0, peak=0.8, end=0.1, warmup_steps=4000, decay_steps=4000)
    steps = on_policy_steps(OnPolicyConfig(fraction, 1), 0, 16_000)
    means = np.mean(steps.reshape(4, 4000), axis=1)
    np.testing.assert_allclose(means, [0.4, 0.8, 0.8, 0.45], atol=4 * 0.5 / np.sqrt(4000))
    late = np.mean(steps[-400:])
    assert late == pytest.approx(0.135, abs=4 * np.sqrt(0.135 / 400))


def test_steps_depend_on_the_seed_alone() -> None:
    config = OnPolicyConfig(0.5, 1)
    steps = on_policy_steps(config, 0, 200)
    assert steps[:8].tolist() == [
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]  # in every version of Python
    np.testing.assert_array_equal(on_policy_steps(config, 0, 200), steps)
    assert 60 < np.sum(on_policy_steps(config, 1, 200) != steps) < 140  # 100 on average, standard deviation 7


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"fraction": 1.5}, "distill.on_policy.fraction is 1.5; it must be from 0 to 1."),
        ({"fraction": -0.1}, "distill.on_policy.fraction is -0.1; it must be from 0 to 1."),
        (
            {"fraction": {"kind": "linear", "peak": 1.0, "end": 2.0}},
            "distill.on_policy.fraction is 2.0; it must be from 0 to 1.",
        ),
        ({"prompt_tokens": 0}, "distill.on_policy.prompt_tokens is 0; it must be at least 1."),
        ({"temperature": 0.0}, "distill.on_policy.temperature is 0.0; it must be a number above 0."),
    ],
)
def test_refused(keys: dict[str, Any], sentence: str) -> None:
    data = {"teacher": None, "dtype": "float32", "on_policy": {"fraction": 0.5, "prompt_tokens": 4, **keys}}
    with pytest.raises(UserError) as error:
        build(DistillConfig, data, "test")
    assert str(error.value) == f"test: {sentence}"


def test_configurations_from_before_it_mean_without() -> None:
    assert build(DistillConfig, {"teacher": None, "dtype": "float32"}, "test").on_policy is None
