"""Matching layer by layer against dense formulas: values, gradients, and positions that must not count."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma2_jax.cli.compose import compose
from gemma2_jax.config import UserError, build, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.distill.matching import MatchConfig, join_captures, match_sums
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.capture import Capture, CapturedLayer, forward
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.distances import hidden_distance
from gemma2_jax.run import RunConfig
from tests.model.apart import layers_apart
from tests.model.models import vivid
from tests.model.numpy_gemma2 import seen_keys
from tests.parameters import mostly_thorough
from tests.programs import arrays

B, T = 2, 150  # of queries in blocks of 128
LAYERS = ((0, 2), (3, 5))
KINDS = ("hidden", "attention")


class Case(NamedTuple):
    """A student, a teacher with another width, depth and number of heads, and two packed rows."""

    student: Gemma2
    teacher: Gemma2
    projections: jax.Array
    batch: Batch
    its: Any  # what is captured of the teacher


@pytest.fixture(scope="module")
def case(toy_config: ModelConfig) -> Case:
    larger = replace(
        toy_config, d_model=48, num_layers=6, num_heads=6, num_kv_heads=3, attn_logit_softcap=20.0
    )
    lengths = (20, 100, 30)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 97, (B, T)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (B, 1)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 3], lengths), (B, 1)).astype(np.int32)
    mask = ((segments < 3) & (draw.random((B, T)) < 0.7)).astype(np.float32)
    projections = 0.2 * jax.random.normal(jax.random.key(2), (len(LAYERS), 32, 48))
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), positions, segments, mask)
    teacher = vivid(larger)
    its = captured(teacher, batch, Capture((2, 4, 5), hidden=True, attention=True))
    return Case(vivid(toy_config), teacher, projections, batch, its)


@partial(jax.jit, static_argnums=2)
def captured(model: Gemma2, batch: Batch, capture: Capture) -> Any:
    arguments = batch.tokens, batch.positions, batch.segment_ids, ComputeConfig(), capture
    return forward(model, *arguments)[1]


def only(kind: str, distance: Any = "mse", layers: tuple[tuple[int, int], ...] = LAYERS) -> MatchConfig:
    return MatchConfig(layers, **{kind: 1.0}, distance=distance)


@partial(jax.jit, static_argnums=0)
def matched(
    match: MatchConfig, student: Gemma2, its: Any, projections: jax.Array | None, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the training step computes."""
    return match_sums(match, projections, captured(student, batch, match.student_capture), its, batch)


def distance_of(name: str, pair: Any, numpy: Any) -> Any:
    """The distance by its definition, [B, T], in NumPy or in JAX."""
    student, teacher = pair
    if name == "mse":
        return numpy.mean((student - teacher) ** 2, -1) / numpy.mean(teacher**2, -1)
    lengths = numpy.sqrt(numpy.sum(student**2, -1)) * numpy.sqrt(numpy.sum(teacher**2, -1))
    return 1 - numpy.sum(student * teacher, -1) / lengths


def mean_attention(layer: Any, model: ModelConfig, index: int, batch: Batch) -> np.ndarray:
    """Probabilities [B, T, S] in float64, one query and one head at a time."""
    query, key = (np.asarray(layer[name], np.float64) for name in ("query", "key"))
    window = None if index % 2 else model.sliding_window
    group = model.num_heads // model.num_kv_heads
    mean = np.zeros((B, T, T))
    for b, i in np.ndindex(B, T):
        seen = seen_keys(i, batch.positions[b], batch.segment_ids[b], window)
        for n in range(model.num_heads):
            scores = key[b, seen, n // group] @ query[b, i, n]
            weights = np.exp(model.attn_logit_softcap * np.tanh(scores / model.attn_logit_softcap))
            mean[b, i, seen] += weights / weights.sum() / model.num_heads
    return mean


@pytest.fixture(scope="module")
def apart(case: Case) -> tuple[Any, Any]:
    read = jax.jit(layers_apart)
    arguments = case.batch.tokens, case.batch.positions, case.batch.segment_ids
    return read(case.student, *arguments), read(case.teacher, *arguments)


@pytest.fixture(scope="module")
def attention_apart(case: Case, apart: tuple[Any, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each pair of layers the student's and the teacher's."""
    return [
        (
            mean_attention(apart[0][own], case.student.config, own, case.batch),
            mean_attention(apart[1][its], case.teacher.config, its, case.batch),
        )
        for own, its in LAYERS
    ]


@mostly_thorough("distance", ["mse", "cosine"])
@mostly_thorough("kind", KINDS)
def test_equals_the_formulas(
    case: Case, apart: tuple[Any, Any], attention_apart: Any, kind: str, distance: str
) -> None:
    total, metrics = matched(only(kind, distance), case.student, case.its, case.projections, case.batch)
    expected = 0.0
    for index, (own, its) in enumerate(LAYERS):
        if kind == "attention":
            pair = attention_apart[index]
        else:
            projection = np.asarray(case.projections[index], np.float64)
            pair = (
                np.asarray(apart[0][own]["hidden"], np.float64) @ projection,
                np.asarray(apart[1][its]["hidden"], np.float64),
            )
        expected += (distance_of(distance, pair, np) * case.batch.loss_mask).sum() / len(LAYERS)
    assert expected > 1
    assert list(metrics) == [f"match_{kind}"]
    assert float(metrics[f"match_{kind}"]) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def dense_sum(
    match: MatchConfig, case: Case, apart: Any, student: Gemma2, projections: jax.Array
) -> jax.Array:
    """The same in JAX with every array whole: all layers, and all scores [B, N, T, S] of a layer."""
    batch = case.batch
    own_layers = layers_apart(student, batch.tokens, batch.positions, batch.segment_ids)
    total = jnp.float32(0)
    for index, (own, its) in enumerate(match.layers):
        if match.attention > 0:
            pair = (
                dense_attention(own_layers[own], case.student.config, own, batch),
                dense_attention(apart[1][its], case.teacher.config, its, batch),
            )
        else:
            pair = (own_layers[own]["hidden"] @ projections[index], apart[1][its]["hidden"])
        total += jnp.sum(distance_of(match.distance, pair, jnp) * batch.loss_mask) / len(match.layers)
    return total


def dense_attention(layer: Any, config: ModelConfig, index: int, batch: Batch) -> jax.Array:
    window = None if index % 2 else config.sliding_window
    seen = np.zeros((B, 1, T, T), bool)
    for b, i in np.ndindex(B, T):
        seen[b, 0, i, seen_keys(i, batch.positions[b], batch.segment_ids[b], window)] = True
    key = jnp.repeat(layer["key"], config.num_heads // config.num_kv_heads, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", layer["query"], key)
    capped = config.attn_logit_softcap * jnp.tanh(scores / config.attn_logit_softcap)
    return jax.nn.softmax(jnp.where(seen, capped, -1e30)).mean(1)


@pytest.mark.parametrize("distance", [pytest.param("mse", marks=pytest.mark.thorough), "cosine"])
@pytest.mark.parametrize("kind", ["hidden", pytest.param("attention", marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_gradients_are_those_of_the_dense_form(
    case: Case, apart: tuple[Any, Any], kind: str, distance: str
) -> None:
    match = only(kind, distance)

    def total(student: Gemma2, projections: jax.Array) -> jax.Array:
        return matched(match, student, case.its, projections, case.batch)[0]

    def dense(student: Gemma2, projections: jax.Array) -> jax.Array:
        return dense_sum(match, case, apart, student, projections)

    found, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1)))(case.student, case.projections)
        for function in (total, dense)
    )
    assert (float(jnp.abs(expected[1]).max()) > 0) == (kind == "hidden")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_student_that_is_its_teacher_is_at_no_distance(case: Case, distance: Any) -> None:
    match = MatchConfig(((0, 0), (3, 3)), hidden=1.0, attention=1.0, distance=distance)
    its = captured(case.student, case.batch, match.teacher_capture)
    _, metrics = matched(match, case.student, its, None, case.batch)
    assert metrics.keys() == {"match_hidden", "match_attention"}
    for value in metrics.values():
        assert float(value) == pytest.approx(0.0, abs=1e-6 * float(case.batch.loss_mask.sum()))


def test_weights_are_of_the_sum(case: Case) -> None:
    match = MatchConfig(LAYERS, hidden=0.5, attention=3.0)
    total, metrics = matched(match, case.student, case.its, case.projections, case.batch)
    expected = 0.5 * metrics["match_hidden"] + 3.0 * metrics["match_attention"]
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


def test_a_layer_of_the_teacher_may_serve_twice(case: Case) -> None:
    both = only("hidden", layers=((1, 4), (3, 4)))
    own = captured(case.student, case.batch, both.student_capture)

    def total(match: MatchConfig, projections: jax.Array) -> float:
        return float(match_sums(match, projections, own, case.its, case.batch)[0])

    alone = [
        total(replace(both, layers=(pair,)), case.projections[index : index + 1])
        for index, pair in enumerate(both.layers)
    ]
    assert total(both, case.projections) == pytest.approx(sum(alone) / 2, rel=1e-5)


@pytest.mark.thorough
def test_masked_tokens_and_other_segments_do_not_count(case: Case) -> None:
    """The last segment has no targets, so that its tokens change neither distance, nor the gradient."""
    match = MatchConfig(LAYERS, hidden=1.0, attention=1.0)

    @jax.jit
    def run(batch: Batch) -> Any:
        def total(student: Gemma2) -> jax.Array:
            its = captured(case.teacher, batch, match.teacher_capture)
            return matched(match, student, its, case.projections, batch)[0]

        return jax.value_and_grad(total)(case.student)

    def with_others_in(segment: int) -> Any:
        is_other = case.batch.segment_ids == segment
        return run(
            replace(case.batch, tokens=np.where(is_other, (case.batch.tokens + 1) % 97, case.batch.tokens))
        )

    before, after = run(case.batch), with_others_in(3)
    chex.assert_trees_all_equal(before[0], after[0])
    chex.assert_trees_all_close(before[1], after[1], rtol=1e-5, atol=1e-6 * float(optax.tree.norm(before[1])))
    assert float(with_others_in(1)[0]) != float(before[0])


def test_no_gradient_goes_to_the_teacher(case: Case) -> None:
    match = MatchConfig(LAYERS, hidden=1.0, attention=1.0)
    own = captured(case.student, case.batch, match.student_capture)
    gradient = jax.jit(jax.grad(lambda its: match_sums(match, case.projections, own, its, case.batch)[0]))(
        case.its
    )
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_state_of_zeros_is_no_nan(distance: Any) -> None:
    def total(hidden: jax.Array) -> jax.Array:
        teacher = CapturedLayer(None, 50.0, hidden=jnp.zeros((1, 2, 4)))
        return jnp.sum(hidden_distance(replace(teacher, hidden=hidden), teacher, None, distance))

    assert bool(jnp.all(jnp.isfinite(jax.grad(total)(jnp.zeros((1, 2, 4))))))


def test_distributions_of_all_queries_are_never_there(case: Case) -> None:
    """Neither forward nor backward: of the scores there is a block at a time, over the larger model's heads."""
    S = 8 * T
    long: Batch = jax.tree.map(lambda x: np.tile(x, (1, 8)), case.batch)
    match = only("attention")
    its = jax.eval_shape(lambda: captured(case.teacher, long, match.teacher_capture))
    total = jax.grad(lambda student, its: matched(match, student, its, None, long)[0])
    jaxpr = jax.make_jaxpr(total)(case.student, its)
    of_keys = [size for shape, size in arrays(jaxpr.jaxpr) if shape and shape[-1] == S]
    assert B * 6 * 100 * S < max(of_keys) <= B * 6 * 128 * S < B * S * S


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden": 0.0}, r"distill\.match\.hidden and attention are both 0"),
    ({"hidden": -1.0}, r"distill\.match\.hidden is -1\.0; it must be a finite number of at least 0"),
    ({"attention": -1.0}, r"distill\.match\.attention is -1\.0"),
    ({"layers": ()}, r"distill\.match\.layers is empty"),
    ({"layers": ((0, -1),)}, r"holds \[0, -1\]; layers are counted from 0"),
    ({"layers": ((1, 1), (1, 3))}, "has the student's layer 1 more than once"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value))
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MatchConfig(**{"layers": LAYERS, "hidden": 1.0, **change})


def composed(*more: str) -> RunConfig:
    return compose(["model=toy", *more])


@pytest.mark.parametrize("layers", ["[[1]]", "[1,2]", "[[1,2,3]]", "[[a,2]]", "[[0.5,2]]", "3"])
def test_layers_that_are_no_pairs(layers: str) -> None:
    with pytest.raises(
        UserError, match=r"distill\.match\.layers is .*; accepted: a list of a list of 2, each a whole number"
    ):
        composed("distill=match", "distill.teacher=runs/t", f"distill.match.layers={layers}")


def test_on_the_command_line() -> None:
    config = composed("distill=match", "distill.teacher=runs/t", "distill.match.layers=[[0,2],[1,3]]")
    assert config.distill.match == MatchConfig(((0, 2), (1, 3)), hidden=1.0)
    assert build(RunConfig, to_dict(config), "itself") == config
    config = composed(
        "objective=distillation", "distill=online", "distill.teacher=runs/t",
        "distill.match={layers: [[1, 3]], attention: 2, distance: cosine}",
    )  # fmt: skip
    assert config.distill.match == MatchConfig(((1, 3),), attention=2.0, distance="cosine")
    with pytest.raises(UserError, match=r"distill\.match\.layers has no value; set it"):
        composed("distill=match", "distill.teacher=runs/t")


def test_matching_without_a_teacher_is_refused() -> None:
    with pytest.raises(UserError, match=r"distill\.match is set, but distill\.teacher is null"):
        DistillConfig(None, "float32", match=MatchConfig(LAYERS, hidden=1.0))


def test_layers_that_the_models_lack_are_refused(toy_run: RunConfig, toy_config: ModelConfig) -> None:
    match = MatchConfig(LAYERS, hidden=1.0)
    with pytest.raises(
        UserError, match=r"names the student's layer 3, but the student has 2 layers, counted from 0 to 1\."
    ):
        replace(toy_run, distill=DistillConfig("runs/teacher", "float32", match=match))
    with pytest.raises(UserError, match="names the teacher's layer 5, but the teacher has 4"):
        match.check_teacher(toy_config, toy_config)


def test_what_serves_several_students() -> None:
    hidden = MatchConfig(((0, 3), (1, 1)), hidden=1.0).teacher_capture
    attention = MatchConfig(((0, 2), (1, 3)), attention=1.0).teacher_capture
    assert join_captures([None, hidden, None, attention]) == Capture((1, 2, 3), True, True)
    assert join_captures([hidden, None]) == Capture((1, 3), hidden=True, attention=False)
    assert join_captures([attention]) == Capture((2, 3), hidden=False, attention=True)
    assert join_captures([None, None]) is None


def test_attention_of_other_windows_is_refused(toy_config: ModelConfig) -> None:
    longer = replace(toy_config, num_layers=8, sliding_window=16)
    fewer_global = replace(toy_config, num_layers=8, global_every=2)
    for pair, teacher, message in (
        (
            (1, 2),
            toy_config,
            r"holds \[1, 2\], but the student's layer 1 is global and .* 2 has a window of 8; with",
        ),
        (
            (0, 2),
            longer,
            r"student's layer 0 has a window of 8 and the teacher's layer 2 has a window of 16; with",
        ),
        (
            (1, 1),
            fewer_global,
            r"student's layer 1 is global and the teacher's layer 1 has a window of 8; with",
        ),
    ):
        with pytest.raises(UserError, match=message):
            MatchConfig((pair,), attention=1.0).check_teacher(toy_config, teacher)
        MatchConfig((pair,), hidden=1.0).check_teacher(toy_config, teacher)
    MatchConfig(((3, 5),), attention=1.0).check_teacher(toy_config, longer)
    MatchConfig(((0, 1), (1, 3)), attention=1.0).check_teacher(toy_config, fewer_global)
