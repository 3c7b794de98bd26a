"""Training on conversations: fine-tuning and every kind of distillation, where only targets with loss count."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.chat_format import render
from gemma2_jax.data.config import ConversationsConfig, DataConfig, TokenizerConfig
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.load import load, load_params, open_source
from gemma2_jax.formats.metadata import Metadata, load_metadata
from gemma2_jax.methods import distillation
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.loop import train
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.teacher_cache import write_cache
from tests.distill.test_cache import write_teacher
from tests.formats.test_deepmind import save, theirs
from tests.model.models import vivid

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def tuned(toy_run: RunConfig, conversations: DataConfig) -> RunConfig:
    """A run on conversations."""
    return replace(toy_run, data=replace(conversations, batch_size=4))


def one_by_one(batch: Batch) -> list[Batch]:
    """The conversations of a batch, each at the beginning of a row of its own."""
    found = []
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max()) + 1):
            at = np.flatnonzero(segments == segment)

            def alone(values: np.ndarray, row: int = row, at: np.ndarray = at) -> np.ndarray:
                moved = np.zeros_like(values[:1])
                moved[0, : len(at)] = values[row, at]
                return moved

            single: Batch = jax.tree.map(alone, batch)
            found.append(replace(single, segment_ids=np.minimum(single.segment_ids, 1)))
    return found


@pytest.mark.thorough
def test_the_gradient_of_packed_conversations_is_that_of_each_alone(tuned: RunConfig) -> None:
    batch = next(train_batches(tuned.data))
    method = build_method(tuned)
    params = Gemma2.init(tuned.model, jax.random.key(0)).params()

    @jax.jit
    def gradient(batch: Batch) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            total, sums = method.loss({"params": params}, {}, batch, jnp.int32(0))
            return total, sums["targets"]

        return jax.grad(loss, has_aux=True)(params)

    packed, targets = gradient(batch)
    alone = [gradient(each) for each in one_by_one(batch)]
    assert len(alone) > 6
    assert sum(float(count) for _, count in alone) == targets == np.sum(batch.loss_mask > 0)
    summed = jax.tree.map(lambda *each: sum(each), *(each for each, _ in alone))
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(summed), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_targets_without_loss_do_not_count(tuned: RunConfig) -> None:
    batch = next(train_batches(tuned.data))
    method, params = build_method(tuned), Gemma2.init(tuned.model, jax.random.key(0)).params()
    loss = jax.jit(lambda batch: method.loss({"params": params}, {}, batch, jnp.int32(0))[0])
    changed = replace(batch, targets=np.where(batch.loss_mask > 0, batch.targets, 7))
    assert float(loss(changed)) == float(loss(batch))


@pytest.fixture(scope="module")
def base(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A model trained on text."""
    config = replace(toy_run, output=str(tmp_path_factory.mktemp("base") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        train(config)
    return config


def test_fine_tuning_starts_from_a_checkpoint(base: RunConfig, tuned: RunConfig, tmp_path: Path) -> None:
    config = replace(tuned, output=str(tmp_path / "run"), initialise=InitConfig(base.output))
    train(config)
    rows = read_metrics(config.output)
    # A random model's is at least that of equally likely tokens.
    assert rows[0]["cross_entropy"] < np.log(tuned.model.vocab_size) - 0.3
    assert rows[7]["cross_entropy"] < rows[0]["cross_entropy"] - 0.3
    # Averages are those over the targets with loss.
    (validation,) = [row for row in rows if row["split"] == "validation"]
    lengths = json.loads((Path(tuned.data.folder) / "manifest.json").read_text())["parts"]
    assert (
        0
        < validation["targets"]
        <= sum(part["validation"]["lengths"]["loss_tokens"] for part in lengths if part["validation"])
    )


@pytest.mark.thorough
def test_fine_tuning_starts_from_deepminds_checkpoint(
    base: RunConfig, tuned: RunConfig, tmp_path: Path
) -> None:
    """The losses are those of the same weights in a converted folder."""
    params = load_params(open_source(base.output), base.model, "float32")
    given, converted = tmp_path / "deepmind", tmp_path / "converted"
    save(given, theirs(params, base.model, transposed=False, flat=True))
    shutil.copy(Path(base.output) / "tokenizer.model", given)
    convert(given, converted, "run", dtype="float32")
    # DeepMind's files do not hold the window.
    config = replace(
        tuned,
        model=replace(tuned.model, sliding_window=4096),
        training=replace(tuned.training, steps=2, eval_every=2),
    )
    losses = {}
    for source in (given, converted):
        output = f"{source}_tuned"
        train(replace(config, output=output, initialise=InitConfig(str(source))))
        losses[source] = [row["cross_entropy"] for row in read_metrics(output)]
    assert losses[given] == losses[converted]


@pytest.mark.thorough
def test_the_run_folder_of_a_base_model_gets_the_turn_token(
    base: RunConfig, tuned: RunConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    initial = Path(shutil.copytree(base.output, tmp_path / "base"))
    Metadata(generation={"eos_token_id": 1}).save(initial)
    config = replace(
        tuned,
        output=str(tmp_path / "run"),
        initialise=InitConfig(str(initial)),
        training=replace(tuned.training, steps=2, eval_every=2),
    )
    train(config)
    assert load_metadata(Path(config.output)).stop_ids == frozenset((1, tokenizer.end_of_turn_id))
    _, loaded = load(config.output)
    assert loaded.stop_ids == {1, tokenizer.end_of_turn_id}


@pytest.fixture(scope="module")
def distilled(tuned: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Distilled on conversations from an online teacher."""
    folder = tmp_path_factory.mktemp("distilled")
    teacher = write_teacher(tuned, vivid(replace(tuned.model, d_model=48)), folder / "teacher")
    return replace(
        tuned,
        objective=ObjectiveConfig(0.0, 1.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher, "float32"),
        training=replace(tuned.training, steps=3, eval_every=3),
        output=str(folder / "online"),
    )


def kls(config: RunConfig) -> list[float]:
    return [row["kl"] for row in read_metrics(config.output) if row["split"] == "train"]


@pytest.mark.thorough
def test_a_cache_trains_as_the_online_teacher(distilled: RunConfig, tmp_path: Path) -> None:
    train(distilled)
    distill = replace(
        distilled.distill,
        cache=str(tmp_path / "cache"),
        encoding=EncodingConfig("full", None, weight_bits=16),
    )
    config = replace(distilled, distill=distill, output=str(tmp_path / "run"))
    write_cache(config)
    train(config)
    assert kls(config) == pytest.approx(kls(distilled), abs=1e-3)
    # Other settings of packing give other rows.
    other = replace(config, data=replace(config.data, too_long="drop"), output=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"data\.too_long"):
        train(other)


@pytest.fixture(scope="module")
def sampling(distilled: RunConfig) -> RunConfig:
    on_policy = OnPolicyConfig(fraction=1.0, prompt_tokens=24)
    return replace(distilled, distill=replace(distilled.distill, on_policy=on_policy))


def test_the_student_writes_the_first_turn_with_loss(
    sampling: RunConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build_method(sampling)
    mesh = build_mesh(sampling.mesh, jax.devices()[:1])
    batch = next(train_batches(sampling.data))
    with jax.set_mesh(mesh):
        monkeypatch.setattr(distillation, "load_teacher", lambda *_: None)
        method.load_frozen(tokenizer, mesh)
        params = jax.device_put(Gemma2.init(sampling.model, jax.random.key(0)).params())
        rolled = jax.jit(method.collect)({"params": params}, {}, on_mesh(batch, mesh), jnp.int32(0))
    rolled = jax.tree.map(np.asarray, rolled)
    starts = np.argmax(batch.loss_mask > 0, axis=1)
    assert (starts < 24).any()
    assert (starts >= 24).any()
    header = tokenizer.encode("<start_of_turn>model\n", control=True)
    for row, start in enumerate(starts):
        targets, mask = rolled.targets[row], rolled.loss_mask[row]
        if start >= 24:
            assert not mask.any()
            continue
        prompt = rolled.tokens[row, : start + 1].tolist()
        assert prompt == batch.tokens[row, : start + 1].tolist()
        assert prompt[-len(header) :] == header
        new = targets[mask > 0].tolist()
        assert not mask[:start].any()
        assert tokenizer.end_of_turn_id not in new[:-1]
        assert new[-1] == tokenizer.end_of_turn_id or len(new) == len(targets) - start


def test_prompts_that_are_all_too_long_are_refused(sampling: RunConfig, tokenizer: Tokenizer) -> None:
    short = replace(sampling.distill, on_policy=OnPolicyConfig(1.0, prompt_tokens=5))
    mesh = build_mesh(sampling.mesh, jax.devices()[:1])
    with pytest.raises(
        UserError, match=r"prompt_tokens is 5, and the prompts of all \d+ .* are longer; the shortest"
    ):
        build_method(replace(sampling, distill=short)).load_frozen(tokenizer, mesh)


@pytest.mark.thorough
def test_on_policy_distillation_on_conversations(
    sampling: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(sampling, output=str(tmp_path / "run"))
    train(config)
    rows = [row for row in read_metrics(config.output) if row["split"] == "train"]
    assert all(row["on_policy"] and row["kl"] > 0 for row in rows)
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        "have more than distill.on_policy.prompt_tokens (24) and carry no loss in on-policy steps" in printed
    )


@pytest.mark.thorough
def test_a_tuned_model_stops_by_itself(toy_run: RunConfig, tmp_path: Path) -> None:
    """A model tuned on templated answers ends at least 99 % of its samples with <end_of_turn>."""
    names = ["Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]
    things = ["a cat", "two dogs", "the sea", "old books", "a small red house"]
    chats = [
        {
            "prompt": f"{question} {name}?",
            "completion": answer.format(name=name, thing=things[len(name) + index & 3]),
        }
        for index, name in enumerate(names * 20)
        for question, answer in (("Who is", "This is {name}."), ("What has", "{name} has {thing}."))
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = TokenizerConfig(str(tmp_path / "data" / "tokenizer.model"), 320)
    data = replace(
        toy_run.data,
        source=str(tmp_path / "chats.jsonl"),
        folder=str(tmp_path / "data"),
        seq_len=128,
        batch_size=16,
        conversations=ConversationsConfig(),
    )
    size = prepare(data, tokenizer).vocab_size
    config = replace(
        toy_run,
        output=str(tmp_path / "run"),
        data=data,
        tokenizer=replace(tokenizer, vocab_size=size),
        model=replace(toy_run.model, vocab_size=size),
        training=replace(toy_run.training, steps=150, eval_every=150),
        checkpoint=replace(toy_run.checkpoint, every=150),
    )
    train(config)
    model, loaded = load(config.output)
    questions = [f"{question} {name}?" for question in ("Who is", "What has") for name in names] * 16
    chats_so_far = [render([{"role": "user", "content": text}], generation_prompt=True) for text in questions]
    prompts = [loaded.encode(text, bos=True, control=True) for text in chats_so_far]
    samples = Sampler(model, loaded).generate_tokens(prompts, SamplingConfig(max_new_tokens=60, seed=1))
    stopped = np.mean([sample[-1] == loaded.end_of_turn_id for sample in samples])
    assert stopped >= 0.99
    texts = [loaded.decode(sample) for sample in samples]
    assert sum(text.endswith(".<end_of_turn>") for text in texts) > 200
