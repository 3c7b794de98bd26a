"""The evaluation harness on our models, against its own `hf` backend on the same exported checkpoint."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.data.config import TokenizerConfig
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.harness import evaluate_tasks
from gemma2_jax.evaluation.harness_tasks import SHIPPED, Tasks, TaskSettings
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.native import write_run
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.mesh import MeshConfig
from tests.model.models import vivid

pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install -e '.[eval]'")

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("one_device"),
    pytest.mark.filterwarnings("ignore"),
]
SHORT = EvaluationConfig(context=512)
DEVICES = jax.devices()


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma2_jax.evaluation.harness_tasks._reaches_hub", lambda: True)
        yield


@pytest.fixture(scope="module")
def run_folder(
    toy_config: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_config: TokenizerConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    config = replace(toy_config, vocab_size=tokenizer.vocab_size, sliding_window=16)
    folder = tmp_path_factory.mktemp("harness") / "run"
    params = vivid(config).params()
    # No single bytes are generated: the libraries decode those that are no character differently.
    pieces = SentencePieceProcessor(model_file=tokenizer_config.path)
    single = np.array([pieces.is_byte(id) for id in range(config.vocab_size)])
    params["embedder"]["embedding"] = np.where(single[:, None], 0, params["embedder"]["embedding"])
    write_run(folder, config, params, Path(tokenizer_config.path))
    return folder


@pytest.fixture(scope="module")
def ours(run_folder: Path) -> Gemma2:
    from gemma2_jax.formats.load import load

    return load(run_folder)[0]


def adapter(model: Gemma2, tokenizer: Tokenizer, chat: bool = False, max_length: int = 512) -> Any:
    from gemma2_jax.evaluation.harness_model import HarnessModel

    return HarnessModel(model, tokenizer, ComputeConfig(), 8, max_length, chat)


@pytest.fixture(scope="module")
def theirs(run_folder: Path) -> Any:
    """The harness's own backend, made with or without the beginning-of-text token in front of prompts."""
    pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    from lm_eval.models.huggingface import HFLM

    folder = run_folder.parent / "exported"
    convert(run_folder, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    )

    def make(bos: bool) -> Any:
        pieces = transformers.AutoTokenizer.from_pretrained(folder)
        return HFLM(
            pretrained=model.eval(), tokenizer=pieces, batch_size=8, max_length=512, add_bos_token=bos
        )

    return make


def samples(model: Any, task: str, chat: bool = False, limit: int = 12) -> list[dict[str, Any]]:
    from lm_eval.evaluator import simple_evaluate

    loaded = Tasks(TaskSettings([task]))
    found = simple_evaluate(
        model=model,
        tasks=loaded.load(loaded.chosen[0]),
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    assert found is not None
    return list(found["samples"][task])


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_answers_have_the_log_likelihoods_of_the_hf_backend(
    ours: Gemma2, theirs: Any, tokenizer: Tokenizer, chat: bool
) -> None:
    found = samples(adapter(ours, tokenizer, chat), "pydoc_functions", chat)
    expected = samples(theirs(True), "pydoc_functions", chat)
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected, strict=True):
        assert one["doc"] == other["doc"]
        for (log_prob, greedy), (their_log_prob, their_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert log_prob == pytest.approx(their_log_prob, rel=1e-4)
            assert greedy == their_greedy
        assert one["acc"] == other["acc"]


@pytest.mark.slow
def test_texts_have_the_log_likelihoods_of_the_hf_backend(
    ours: Gemma2, theirs: Any, tokenizer: Tokenizer
) -> None:
    """That backend begins a text with two bos unless its prompts have none (lm-eval 0.4.13)."""
    found = samples(adapter(ours, tokenizer), "pydoc_passages")
    expected = samples(theirs(False), "pydoc_passages")
    for one, other in zip(found, expected, strict=True):
        assert one["filtered_resps"][0] == pytest.approx(other["filtered_resps"][0], rel=1e-4)


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generated_texts_are_those_of_the_hf_backend(
    ours: Gemma2, theirs: Any, tokenizer: Tokenizer, chat: bool
) -> None:
    found = samples(adapter(ours, tokenizer, chat), "pydoc_modules", chat)
    expected = samples(theirs(True), "pydoc_modules", chat)
    assert [one["resps"] for one in found] == [other["resps"] for other in expected]
    assert any(one["resps"][0][0] for one in found)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_every_window_begins_with_one_bos(
    ours: Gemma2, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = adapter(ours, tokenizer, max_length=24), list[Any]()

    def score(_: Any, windows: Sequence[Any], show: Any) -> list[Any]:
        seen.extend(window.tokens for window in windows)
        return [SimpleNamespace(log_prob=-1.0, is_greedy=False) for _ in windows]

    monkeypatch.setattr("gemma2_jax.evaluation.continuations.ContinuationScorer.score", score)
    long = "the model learns from every token of the teacher " * 5
    model.loglikelihood(
        requests(("", "a"), ("the model", " learns"), ("<bos>the model", " learns"), (long, " ends"))
    )
    assert seen[1] == seen[2]
    assert len(seen[3]) == 25
    count = len(seen)
    assert model.loglikelihood_rolling(requests((long,), ("the",))) == [-(len(seen) - count - 1), -1]
    assert len(seen) > count + 2
    for tokens in seen:
        assert tokens.count(tokenizer.bos_id) == 1
        assert tokens[0] == tokenizer.bos_id
    prompt = model._prompt(long, model._sampling({"max_gen_toks": 9}))
    assert prompt[:1] == [tokenizer.bos_id]
    assert len(prompt) == 15


def test_generation_settings(ours: Gemma2, tokenizer: Tokenizer) -> None:
    model = adapter(ours, tokenizer)
    greedy = model._sampling({"until": ["\n", ""], "do_sample": False, "temperature": 0.7})
    assert (greedy.temperature, greedy.stop_texts, greedy.max_new_tokens) == (0.0, ("\n",), 256)
    sampled = model._sampling({"do_sample": True, "top_p": 0.9, "max_new_tokens": 4, "until": "."})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (1.0, 0.9, 4)
    with pytest.raises(UserError, match="its generation_kwargs have num_beams; accepted: do_sample,"):
        model._sampling({"num_beams": 4})
    drawn = model.generate_until(requests(*[("the", {"do_sample": True, "max_gen_toks": 8})] * 3))
    assert len(set(drawn)) == 3  # copies of a request are different samples


def test_the_shipped_tasks_run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "eval",
        str(run_folder),
        "--tasks",
        "offline",
        "--limit",
        "5",
        "mesh.data=1",
        "--context",
        "512",
    ]
    files = "--json", str(tmp_path / "tasks.json"), "--samples", str(tmp_path / "samples.jsonl")
    assert main([*command, *files]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "tasks.json").read_text())
    assert record["versions"]["lm_eval"]
    [row] = record["rows"]
    assert row["left_out"] == {}
    metrics = {name: set(task["metrics"]) for name, task in row["tasks"].items()}
    assert metrics == {
        "pydoc_functions": {"acc", "acc_norm"},
        "pydoc_passages": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
        "pydoc_modules": {"exact_match"},
    }
    assert all(name in printed for name in metrics)
    assert {task["documents"] for task in row["tasks"].values()} == {5}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    accuracy = np.mean([line["acc"] for line in lines if line["task"] == "pydoc_functions"])
    assert row["tasks"]["pydoc_functions"]["metrics"]["acc"]["value"] == accuracy
    assert row["tasks"]["pydoc_modules"]["shots"] == 3


def test_tasks_that_cannot_run_are_left_out(run_folder: Path, tmp_path: Path) -> None:
    """And the others go on: tasks of the user's own folder, one without data and one that the sampler cannot do."""
    for name in ("documents.py", "pydoc_modules.jsonl", "pydoc_modules_examples.jsonl"):
        shutil.copy(SHIPPED / name, tmp_path)
    text = (SHIPPED / "pydoc_modules.yaml").read_text()
    own = text.replace("task: pydoc_modules", "task: own_modules")
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "beams.yaml").write_text(
        own.replace("own_modules", "own_beams").replace("max_gen_toks: 12", "num_beams: 12")
    )
    missing = f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}"
    (tmp_path / "missing.yaml").write_text(
        own.replace("own_modules", "own_missing").replace(
            "custom_dataset: !function documents.modules", missing
        )
    )
    names = ["own_missing", "own_beams", "own_modules"]
    settings = TaskSettings(names, shots=1, tasks_folder=str(tmp_path))
    record, found = evaluate_tasks(run_folder, settings, replace(SHORT, limit=2))
    [row] = record.rows
    assert set(row.tasks) == {"own_modules"}
    assert row.tasks["own_modules"].shots == 1
    assert {sample["task"] for sample in found} == {"own_modules"}
    assert "own_missing cannot be loaded: " in row.left_out["own_missing"]
    assert "none.jsonl" in row.left_out["own_missing"]
    assert row.left_out["own_beams"].startswith(
        "own_beams cannot be run: its generation_kwargs have num_beams"
    )


def test_a_folder_that_holds_no_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("task: [unclosed\n")
    with pytest.raises(UserError) as caught:
        Tasks(TaskSettings(["offline"], tasks_folder=str(tmp_path)))
    assert f"evaluation.tasks_folder has {tmp_path}/bad.yaml, which cannot be read as YAML: " in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_an_unknown_task_gets_the_nearest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def small(include_path: Any = None, include_defaults: bool = True) -> Any:
        return TaskManager(
            include_path=include_path, include_defaults=False
        )  # the whole index takes half a minute

    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    with pytest.raises(UserError) as caught:
        Tasks(TaskSettings(["pydoc_function", "reprot", "qqqqqq"]))
    assert str(caught.value).splitlines() == [
        "evaluation.tasks has pydoc_function, which is no task or suite; did you mean pydoc_functions "
        "(suites: offline, report, safety).",
        "evaluation.tasks has qqqqqq, which is no task or suite; `lm-eval ls tasks` lists the harness's tasks "
        "(suites: offline, report, safety).",
        "evaluation.tasks has reprot, which is no task or suite; did you mean report "
        "(suites: offline, report, safety).",
    ]


@pytest.mark.slow
def test_on_a_mesh(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TaskSettings(["offline"])
    whole, _ = evaluate_tasks(run_folder, settings, replace(SHORT, limit=4))
    monkeypatch.setattr(jax, "devices", lambda *_: DEVICES)
    split, _ = evaluate_tasks(
        run_folder, settings, replace(SHORT, limit=4, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    )
    assert len(whole.rows[0].tasks) == 3
    for name, scores in whole.rows[0].tasks.items():
        for metric, value in scores.metrics.items():
            assert split.rows[0].tasks[name].metrics[metric].value == pytest.approx(value.value, rel=1e-3)
