"""Matching a teacher layer by layer: which of its hidden states and attention a student is to reproduce.

Where the widths differ, a learned linear projection takes the student's hidden states to the teacher's width. It
is trained with the student and saved for a run that goes on, and is no part of the model.
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
    """Which layers are matched, and how much it counts beside the objective.

    Each distance is averaged over the pairs of layers and the batch's targets, then weighted into the loss.

    Attributes:
        layers: pairs [student's layer, teacher's layer], counted from 0.
        hidden: weight of the distance between hidden states after the layers.
        attention: weight of the distance between the layers' attention, averaged over heads.
        distance: `mse`, the squared error over the teacher's own square; or `cosine`, 1 - cos.
    """

    layers: tuple[tuple[int, int], ...]
    hidden: float = 0.0
    attention: float = 0.0
    distance: DistanceName = "mse"

    def __post_init__(self) -> None:
        for name in ("hidden", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"distill.match.{name} is {getattr(self, name)}; it must be a number that is not negative."
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
                    f"distill.match.layers has the student's layer {student} more than once; it can match one only."
                )
            if self.attention > 0 and (student - teacher) % 2:
                raise UserError(
                    f"distill.match.layers holds {[student, teacher]}, a local and a global layer, which see different "
                    "keys; with distill.match.attention above 0, both must be even (local) or odd (global)."
                )

    @property
    def of_student(self) -> Capture:
        """What is taken of the student's forward pass."""
        return self._capture({student for student, _ in self.layers})

    @property
    def of_teacher(self) -> Capture:
        return self._capture({teacher for _, teacher in self.layers})

    def _capture(self, layers: set[int]) -> Capture:
        return Capture(tuple(sorted(layers)), hidden=self.hidden > 0, attention=self.attention > 0)

    def check_student(self, model: ModelConfig) -> None:
        """Raises UserError if the student lacks a layer."""
        _check_layers(self.of_student, model, "student")

    def check_teacher(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises UserError if the teacher lacks a layer, or its local layers have another window than the student's."""
        _check_layers(self.of_teacher, teacher, "teacher")
        local = any(layer % 2 == 0 for layer in self.of_student.layers)
        if self.attention > 0 and local and student.sliding_window != teacher.sliding_window:
            raise UserError(
                f"distill.match.attention is above 0 and distill.match.layers holds local layers, whose window "
                f"(model.sliding_window) is {student.sliding_window} and the teacher's {teacher.sliding_window}; "
                "match global layers (odd numbers), or give the student the teacher's window."
            )

    def projection_specs(self, student: ModelConfig, teacher: ModelConfig) -> Specs | None:
        """`projections` [M, D, E], from the student's width D to the teacher's, E, one for each of M pairs of layers.

        Their variance of 1 / D lets a projected state begin as large as the state. None where none are needed.
        """
        if self.hidden == 0 or student.d_model == teacher.d_model:
            return None
        return {
            "projections": Weight("MDE", (len(self.layers), student.d_model, teacher.d_model), fan_in="D")
        }


def captures_joined(captures: Iterable[Capture | None]) -> Capture | None:
    """What one forward pass gives for several that need layers of it; None if none does."""
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
    """The weighted distance, summed over the batch's targets, and `match_hidden` and `match_attention` unweighted.

    Args:
        projections: [M, D, E], one for each of `match.layers`; None where the widths are the same.
        student, teacher: what `match.of_student` and `match.of_teacher` captured, or more, by layer.
    """
    distances: dict[str, list[jax.Array]] = {"hidden": [], "attention": []}  # [B, T] of each pair of layers
    for index, (own, its) in enumerate(match.layers):
        of_student, of_teacher = student[own], teacher[its]
        if match.hidden > 0:
            projection = None if projections is None else projections[index]
            distances["hidden"].append(hidden_distance(of_student, of_teacher, projection, match.distance))
        if match.attention > 0:
            distances["attention"].append(
                attention_distance(of_student, of_teacher, batch.positions, batch.segment_ids, match.distance)
            )
    total, metrics = jnp.float32(0), {}
    for kind, of_pairs in distances.items():
        if of_pairs:
            metrics[f"match_{kind}"] = jnp.sum(sum(of_pairs) * batch.loss_mask) / len(of_pairs)
            total += getattr(match, kind) * metrics[f"match_{kind}"]
    return total, metrics


def _check_layers(capture: Capture, model: ModelConfig, whose: str) -> None:
    for layer in capture.layers:
        if layer >= model.num_layers:
            raise UserError(
                f"distill.match.layers names the {whose}'s layer {layer}, and the {whose} has {model.num_layers}; "
                f"layers are counted from 0 to {model.num_layers - 1}."
            )
