"""What all tests share: eight CPU devices, one compile cache, one tiny model, one small corpus, one toy run."""

import gc
import json
import os
import pathlib
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

# Set before JAX is imported, since it reads these once. Toy models spend more time in compilation than in execution, so
# the compiler does not optimise: the tests then take little more than half as long. Processes that tests start inherit
# these variables, and so reuse programs that are already compiled.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Eight devices on two busy cores may keep one another waiting for longer than 40 s, after which XLA aborts.
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# In the background of a shell, or under nohup, these are ignored, and so by all processes that tests start and stop.
if threading.current_thread() is threading.main_thread():
    for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(_number) == signal.SIG_IGN:
            signal.signal(_number, _usual)

import hypothesis
import jax
import pytest

from gemma2_jax.checkpoints.store import CheckpointConfig
from gemma2_jax.data.config import ConversationsConfig, DataConfig, TokenizerConfig
from gemma2_jax.data.prepare import prepare
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.config import TrainingConfig
from gemma2_jax.training.metrics import MetricsConfig
from gemma2_jax.training.optimizer import OptimizerConfig

# On a busy machine, an example may take any time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

WORDS = """the a model teacher student learns from probability of every token in its context and then forgets
nothing that was said before 42 2024 attention window layer gradient""".split()  # noqa: SIM905


# The longest files come first, so that no worker is left alone with one of them at the end.
LONGEST = ("test_notebooks.py", "test_lora.py", "test_together.py", "test_training.py", "test_step.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def freed_programs() -> Iterator[None]:
    """Frees the compiled programs of a file after it: those of all files take 5 GB per worker."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def toy_config() -> ModelConfig:
    """A Gemma 2 in which every size differs and windows are shorter than sequences."""
    return ModelConfig(
        vocab_size=97,
        num_layers=4,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        sliding_window=8,
        query_pre_attn_scalar=8,
    )


@pytest.fixture(scope="session")
def toy_model(toy_config: ModelConfig) -> Gemma2:
    return Gemma2.init(toy_config, jax.random.key(0))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents from 1 to 400 words, all different."""
    draw = random.Random(0)
    return [
        f"{number}: " + " ".join(draw.choices(WORDS, k=draw.choice([1, 5, 20, 60, 400])))
        for number in range(120)
    ]


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The documents as a JSONL file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer_config(corpus: pathlib.Path) -> TokenizerConfig:
    """Of a tokenizer that is trained with the first preparation."""
    return TokenizerConfig(path=str(corpus.parent / "tokenizer.model"), vocab_size=400)


@pytest.fixture(scope="session")
def data(corpus: pathlib.Path, tokenizer_config: TokenizerConfig) -> DataConfig:
    """The corpus, prepared in several shards."""
    config = DataConfig(
        source=str(corpus),
        folder=str(corpus.parent / "prepared"),
        validation_fraction=0.2,
        seq_len=32,
        batch_size=4,
        seed=0,
        workers=1,
        shard_characters=10_000,
    )
    prepare(config, tokenizer_config)
    return config


@pytest.fixture(scope="session")
def chats() -> list[list[tuple[str, str]]]:
    """Conversations of two to eight turns, roles and contents, all different."""
    draw = random.Random(1)
    return [
        [
            (
                "assistant" if turn % 2 else "user",
                f"{number} " + " ".join(draw.choices(WORDS, k=draw.choice([1, 4, 9]))),
            )
            for turn in range(draw.randint(2, 8))
        ]
        for number in range(150)
    ]


@pytest.fixture(scope="session")
def conversations(
    chats: list[list[tuple[str, str]]], data: DataConfig, tokenizer_config: TokenizerConfig
) -> DataConfig:
    """The conversations as `messages`, prepared in several shards with the corpus's tokenizer."""
    folder = pathlib.Path(data.folder).parent / "chats"
    folder.mkdir()
    records = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = replace(
        data,
        source=str(folder / "chats.jsonl"),
        folder=str(folder / "prepared"),
        seq_len=128,
        conversations=ConversationsConfig(),
    )
    prepare(config, tokenizer_config)
    return config


@pytest.fixture(scope="session")
def tokenizer(data: DataConfig, tokenizer_config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of the prepared corpus."""
    return Tokenizer.load(tokenizer_config.path)


@pytest.fixture(scope="session")
def toy_run(toy_config: ModelConfig, data: DataConfig, tokenizer_config: TokenizerConfig) -> RunConfig:
    """A run of a few seconds, pretraining on one device; tests replace what they are about, and `output`."""
    return RunConfig(
        name="toy",
        output="unset",
        seed=0,
        model=replace(toy_config, vocab_size=400, num_layers=2),
        compute=ComputeConfig(),
        data=data,
        tokenizer=tokenizer_config,
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        objective=ObjectiveConfig(cross_entropy=1.0, forward_kl=0.0, temperature=1.0, block_tokens=48),
        distill=DistillConfig(teacher=None, dtype="float32"),
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            schedule="cosine",
            warmup_steps=2,
            decay_steps=0,
            final_fraction=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(steps=8, accumulation=1, log_every=1, eval_every=8),
        checkpoint=CheckpointConfig(every=3, keep=2),
        metrics=MetricsConfig(tensorboard=False, wandb_project=None),
    )


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """A run takes all devices there are; those of a module that uses this take one, to be fast."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield
