"""Layer matching: trains a student to reproduce hidden states and attention of some of its teacher's layers.

If the widths differ, a learned linear projection maps the student's hidden states to the teacher's width. It is trained
with the student and saved in its checkpoints, but is not a part of the model.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.model.capture import Capture, CapturedLayer
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import Specs, Weight
from gemma2_jax.objectives.distances import DistanceName, attention_distance, hidden_distance


@dataclass(frozen=True)
class MatchConfig:
    """Which layers are matched, and with which weights in the loss.

    Each distance is averaged over the pairs of layers and the batch's targets, then multiplied by its weight and added
    to the loss.

    Attributes:
        layers: pairs [student's layer, teacher's layer], counted from 0.
        hidden: weight of the distance between hidden states after the layers.
        attention: weight of the distance between the layers' attention, averaged over heads.
        distance: `mse`, the squared error relative to the teacher's square; or `cosine`, 1 - cos.
    """

    layers: tuple[tuple[int, int], ...]
    hidden: float = 0.0
    attention: float = 0.0
    distance: DistanceName = "mse"

    def __post_init__(self) -> None:
        for name in ("hidden", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"distill.match.{name} is {getattr(self, name)}; it must be a finite number of at least 0."
                )
        if self.hidden == 0 and self.attention == 0:
            raise UserError("distill.match.hidden and attention are both 0; at least one must be above 0.")
        if not self.layers:
            raise UserError(
                "distill.match.layers is empty; it must hold at least one pair [student's layer, teacher's layer]."
            )
        students = [student for student, _ in self.layers]
        for student, teacher in self.layers:
            if min(student, teacher) < 0:
                raise UserError(
                    f"distill.match.layers holds {[student, teacher]}; layers are counted from 0."
                )
            if students.count(student) > 1:
                raise UserError(
                    f"distill.match.layers has the student's layer {student} more than once; it can match only one "
                    "layer of the teacher."
                )

    @property
    def student_capture(self) -> Capture:
        """The outputs to capture in the student's forward pass."""
        return self._capture({student for student, _ in self.layers})

    @property
    def teacher_capture(self) -> Capture:
        """The outputs to capture in the teacher's forward pass."""
        return self._capture({teacher for _, teacher in self.layers})

    def _capture(self, layers: set[int]) -> Capture:
        return Capture(tuple(sorted(layers)), hidden=self.hidden > 0, attention=self.attention > 0)

    def check_student(self, model: ModelConfig) -> None:
        """Raises UserError if the student lacks a layer."""
        _check_layers(self.student_capture, model, "student")

    def check_teacher(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises UserError if the teacher lacks a layer, or if attention is matched between layers of other windows."""
        _check_layers(self.teacher_capture, teacher, "teacher")
        if self.attention == 0:
            return
        for pair in self.layers:
            windows = student.windows[pair[0]], teacher.windows[pair[1]]
            if windows[0] != windows[1]:
                own, other = ("is global" if each is None else f"has a window of {each}" for each in windows)
                raise UserError(
                    f"distill.match.layers holds {list(pair)}, but the student's layer {pair[0]} {own} and the "
                    f"teacher's layer {pair[1]} {other}; with distill.match.attention above 0, both must be global or "
                    "have the same window."
                )

    def projection_specs(self, student: ModelConfig, teacher: ModelConfig) -> Specs | None:
        """Specs of `projections` [M, D, E]: one for each of M pairs of layers, from the student's width D to the
        teacher's width E.

        Their initial variance of 1 / D preserves the magnitude of a state. None if no projections are needed.
        """
        if self.hidden == 0 or student.d_model == teacher.d_model:
            return None
        return {
            "projections": Weight("MDE", (len(self.layers), student.d_model, teacher.d_model), fan_in="D")
        }


def join_captures(captures: Iterable[Capture | None]) -> Capture | None:
    """The union of several captures, for one forward pass that serves them all; None if all are None."""
    found = [capture for capture in captures if capture is not None]
    if not found:
        return None
    return Capture(
        tuple(sorted({layer for capture in found for layer in capture.layers})),
        hidden=any(capture.hidden for capture in found),
        attention=any(capture.attention for capture in found),
    )


def match_sums(
    match: MatchConfig,
    projections: jax.Array | None,
    student: Mapping[int, CapturedLayer],
    teacher: Mapping[int, CapturedLayer],
    batch: Batch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted distance summed over the batch's targets, and the unweighted `match_hidden` and
    `match_attention`.

    Args:
        projections: [M, D, E], one for each of `match.layers`; None if the widths are equal.
        student, teacher: captured layers by number; at least those of `match.student_capture` and
            `match.teacher_capture`.
    """
    distances: dict[str, list[jax.Array]] = {"hidden": [], "attention": []}  # [B, T] for each pair of layers
    for index, (student_number, teacher_number) in enumerate(match.layers):
        student_layer, teacher_layer = student[student_number], teacher[teacher_number]
        if match.hidden > 0:
            projection = None if projections is None else projections[index]
            distances["hidden"].append(
                hidden_distance(student_layer, teacher_layer, projection, match.distance)
            )
        if match.attention > 0:
            distances["attention"].append(
                attention_distance(
                    student_layer, teacher_layer, batch.positions, batch.segment_ids, match.distance
                )
            )
    total, metrics = jnp.float32(0), {}
    for kind, per_pair in distances.items():
        if per_pair:
            metrics[f"match_{kind}"] = jnp.sum(sum(per_pair) * batch.loss_mask) / len(per_pair)
            total += getattr(match, kind) * metrics[f"match_{kind}"]
    return total, metrics


def _check_layers(capture: Capture, model: ModelConfig, whose: str) -> None:
    for layer in capture.layers:
        if layer >= model.num_layers:
            raise UserError(
                f"distill.match.layers names the {whose}'s layer {layer}, but the {whose} has {model.num_layers} "
                f"layers, counted from 0 to {model.num_layers - 1}."
            )
