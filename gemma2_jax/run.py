"""The configuration of one training run: the configurations of all subpackages, checked as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from gemma2_jax.checkpoints.store import CheckpointConfig
from gemma2_jax.config import UserError, refuse
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.model.adaptation import AdaptationConfig, build_adaptation
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.objectives.objective import DIVERGENCES, ObjectiveConfig
from gemma2_jax.processes.hosts import HostsConfig
from gemma2_jax.schedule import ScheduleConfig, count_steps
from gemma2_jax.sharding.layout import LayoutConfig
from gemma2_jax.sharding.mesh import MeshConfig
from gemma2_jax.training.config import TrainingConfig
from gemma2_jax.training.metrics import MetricsConfig
from gemma2_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class RunConfig:
    """One training run. It is saved as config.yaml in the run folder; that file alone suffices to repeat the run.

    Attributes:
        name: name of the run in tables.
        output: the run folder.
        seed: seed of the initial weights and of the student's samples; the order of the data has its own, data.seed.
        compilation_cache: folder or bucket that compiled programs are stored in and loaded from; null for none.
        profile: whether to trace some steps (`training.profile_steps`) into the run folder; for runs that are trained
            together, into the folder of the first unfinished run.
    """

    name: str
    output: str
    seed: int
    model: ModelConfig
    compute: ComputeConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    mesh: MeshConfig
    objective: ObjectiveConfig
    distill: DistillConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    # Older runs lack these keys.
    initialise: InitConfig = field(default_factory=InitConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    compilation_cache: str | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        for key, value in (("name", self.name), ("output", self.output)):
            if not value.strip():
                yield f"{key} is empty; it must be text, as in {key}=mine."
        yield from self._about_teacher()
        yield from self._about_on_policy()
        yield from self._about_adaptation()
        if self.data.batch_size % self.training.accumulation:
            yield (
                f"training.accumulation is {self.training.accumulation}, which does not divide data.batch_size "
                f"({self.data.batch_size})."
            )
        if self.profile and self.training.profile_steps[1] > self.training.steps:
            yield (
                f"training.profile_steps ends with {self.training.profile_steps[1]}, after the last step "
                f"({self.training.steps}); choose earlier steps, or profile=false."
            )
        scheduled: dict[str, OptimizerConfig | ScheduleConfig] = {
            "optimizer": self.optimizer,
            **self._schedules(),
        }
        for name, schedule in scheduled.items():
            try:
                count_steps(name, schedule.warmup_steps, schedule.decay_steps, self.training.steps)
            except UserError as error:
                yield str(error)
        intervals = {
            "checkpoint.every": self.checkpoint.every,
            "training.eval_every": self.training.eval_every,
        }
        for name, every in intervals.items():
            if every % self.training.log_every:
                yield (
                    f"{name} is {every}; it must be a multiple of training.log_every ({self.training.log_every}), "
                    "so that a resumed run logs the same averages."
                )

    def _about_teacher(self) -> Iterator[str]:
        """Yields conflicts between the objective and the teacher."""
        teachers = {"distill.teacher": self.distill.teacher, "distill.cache": self.distill.cache}
        given = [name for name, value in teachers.items() if value is not None]
        divergences = self.objective.divergences
        if divergences and not given:
            yield (
                f"objective.{divergences[0]} is above 0, which needs a teacher; set distill.teacher to its checkpoint."
            )
        if self.distill.match is not None:
            try:
                self.distill.match.check_student(self.model)
            except UserError as error:
                yield str(error)
        elif given and not divergences:
            yield (
                f"{given[0]} is set, but no divergence of the objective has a weight above 0 "
                f"({', '.join(DIVERGENCES)}) and distill.match is null, so the teacher would have no effect."
            )
        if self.distill.cache is None:
            return
        if divergences != ("forward_kl",):
            yield (
                "distill.cache holds only some tokens of each teacher distribution, enough for forward_kl alone, "
                f"but the objective has {', '.join(divergences)}; set objective=distillation, or train without a cache."
            )
        if "temperature" in self.objective.schedules:
            yield (
                "objective.temperature is a schedule, but distill.cache was made at one temperature; set "
                "objective.temperature to that number."
            )
            return
        encoding = self.distill.encoding
        if encoding is not None and encoding.temperature != self.objective.temperature:
            yield (
                f"distill.encoding.temperature is {encoding.temperature}, and objective.temperature is "
                f"{self.objective.temperature}; they must be equal, since training from a cache uses the temperature "
                "that it was made at."
            )

    def _about_on_policy(self) -> Iterator[str]:
        on_policy = self.distill.on_policy
        if on_policy is None:
            return
        if self.distill.teacher is None:
            yield (
                "distill.on_policy is set and distill.teacher is null; on-policy distillation needs a teacher for the "
                "student's samples."
            )
        if self.distill.cache is not None:
            yield (
                "distill.on_policy and distill.cache are both set; a cache holds no targets for the student's own "
                "samples, so one of them must be null."
            )
        if self.objective.cross_entropy > 0:
            yield (
                f"objective.cross_entropy is {self.objective.cross_entropy}; it must be 0 with distill.on_policy, "
                "since a student learns nothing from the cross-entropy with its own samples."
            )
        if on_policy.prompt_tokens >= self.data.seq_len:
            yield (
                f"distill.on_policy.prompt_tokens is {on_policy.prompt_tokens}; it must be below data.seq_len "
                f"({self.data.seq_len}), to leave room for the student's tokens."
            )

    def _about_adaptation(self) -> Iterator[str]:
        if not self.adaptation.has_base:
            return
        initialise, kind = self.initialise, f"adaptation.kind is {self.adaptation.kind}"
        if initialise.source is None:
            yield (
                f"{kind} and initialise.source is null; the frozen weights come from a checkpoint: write "
                "initialise=checkpoint initialise.source=CHECKPOINT."
            )
        for key in ("layers", "width"):
            if getattr(initialise, key) is not None:
                yield (
                    f"{kind} and initialise.{key} is set; the frozen weights are those of a checkpoint of the same "
                    "sizes: write initialise=checkpoint."
                )
        try:
            build_adaptation(self.adaptation, self.model)
        except UserError as error:
            yield str(error)

    def _schedules(self) -> dict[str, ScheduleConfig]:
        """The schedules of this run, by key."""
        found = {f"objective.{name}": schedule for name, schedule in self.objective.schedules.items()}
        on_policy = self.distill.on_policy
        if on_policy is not None and isinstance(on_policy.fraction, ScheduleConfig):
            found["distill.on_policy.fraction"] = on_policy.fraction
        return found
