"""Times one training step in gemma2_jax and in Hugging Face transformers, on a CPU.

    pip install -e '.[reference]'
    python experiments/benchmarks/step_vs_transformers.py --threads 1
    python experiments/benchmarks/step_vs_transformers.py --threads 2

Both sides use the same float32 weights of a small Gemma 2 and the same 4 x 512 tokens. A step is forward,
backward and AdamW. Ours is the trainer's own step with its default configuration for CPUs, so it also clips by
the global norm and computes metrics. Both sides run alternately in one process, on the same cores; the table
shows medians over the rounds. Compilation (ours) and the first step (both) are not timed. Before timing, the
script checks that both sides compute the same loss. `decoding.py` times generation.

transformers uses its eager attention: its "sdpa" drops Gemma 2's soft cap and thus computes a different model. Its
optimizer is torch.optim.AdamW with fused=True.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from shared import Seconds, TheirTraining, alternate, their_model, use_cores

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
# Two float32 implementations of ~10^10 operations: their mean losses differ by rounding, some 1e-7 of 9.
LOSS_TOLERANCE = 1e-5
SIZES: dict[str, Any] = dict(
    vocab_size=8192, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1024,
    sliding_window=128, query_pre_attn_scalar=64,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The work of both sides: train on `batch` x `length` tokens."""

    batch: int
    length: int

    def tokens(self) -> Any:
        """Returns random ids, int32 [batch, length + 1]; speed does not depend on their values."""
        shape = (self.batch, self.length + 1)
        return np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape, dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="cores and threads for each side (1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--steps", type=int, default=2, help="training steps per round (2)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (512)")
    options = parser.parse_args()

    use_cores(options.threads)
    import torch
    import transformers

    from gemma2_jax.model.config import ModelConfig

    work = Work(options.batch, options.length)
    tokens = torch.from_numpy(work.tokens()).long()
    torch.manual_seed(0)
    model = their_model(ModelConfig(**SIZES))
    targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    theirs = TheirTraining(model, *targets, LEARNING_RATE, WEIGHT_DECAY)
    ours = OurSide(work, theirs.model.state_dict())
    print(
        f"jax {ours.version}, transformers {transformers.__version__}, torch {torch.__version__}; "
        f"{options.threads} thread(s), {options.rounds} rounds"
    )
    check_agreement(ours, theirs)

    for step in (steps := [ours.step, theirs.step]):
        step()  # compiles ours
    seconds = alternate(steps, options.rounds, options.steps)
    print(f"{'':24}{'gemma2_jax':>20}{'transformers':>20}{'ratio':>8}  (of each round)")
    print_row("training, tokens/s", work.batch * work.length, seconds)


def print_row(name: str, tokens: int, seconds: list[list[Seconds]]) -> None:
    ours, theirs = (statistics.median(each.wall for each in durations) for durations in seconds)
    ratios = [their.wall / our.wall for our, their in zip(*seconds, strict=True)]
    print(
        f"{name:24}{tokens / ours:>11.0f} ({ours:5.3f} s){tokens / theirs:>11.0f} ({theirs:5.3f} s)"
        f"{theirs / ours:>8.2f}  ({min(ratios):.2f} .. {max(ratios):.2f})"
    )


def check_agreement(ours: "OurSide", theirs: TheirTraining) -> None:
    """Exits unless both sides compute the same loss."""
    our_loss, their_loss = ours.loss(), theirs.loss()
    print(
        f"loss before training: {our_loss:.6f} and {their_loss:.6f} (tolerance {LOSS_TOLERANCE:g}, relative)"
    )
    if abs(our_loss - their_loss) > LOSS_TOLERANCE * their_loss:
        sys.exit("The two sides compute different losses.")


def our_params(state: Any, config: Any) -> dict[str, Any]:
    """Returns the state dict of a Gemma2ForCausalLM as our nested dict, laid out like `weight_specs`."""
    from gemma2_jax.formats.layouts import HUGGINGFACE, expand
    from gemma2_jax.model.weights import map_specs, weight_specs

    specs = weight_specs(config)
    weights: dict[str, list[Any]] = {}  # by path; one part per pair of layers, in order, for stacked weights
    for name, entry in expand(HUGGINGFACE, specs).items():
        for place, part in zip(entry.places, entry.split(state[name].numpy()), strict=True):
            weights.setdefault(place.path, []).append(part)
    params: dict[str, Any] = map_specs(
        lambda path, _: np.stack(weights[path]) if path.startswith("pairs/") else weights[path][0], specs
    )
    return params


class OurSide:
    """gemma2_jax, with its default training on a CPU."""

    def __init__(self, work: Work, state: Any) -> None:
        import jax

        from gemma2_jax.cli.compose import compose
        from gemma2_jax.data.batch import Batch
        from gemma2_jax.methods.language_modelling import LanguageModelling
        from gemma2_jax.methods.method import BASE
        from gemma2_jax.sharding.mesh import build_mesh
        from gemma2_jax.training.state import Update, initial_state
        from gemma2_jax.training.step import build_evaluation_step, build_train_step

        self.version = jax.__version__
        values = {f"model.{name}": value for name, value in SIZES.items()}
        values |= {"optimizer.learning_rate": LEARNING_RATE, "optimizer.weight_decay": WEIGHT_DECAY}
        config = compose(["optimizer=constant"], values=values)
        jax.set_mesh(mesh := build_mesh(config.mesh))
        method = LanguageModelling(config)
        update = Update(config, method.specs)
        self.state, base = initial_state(config, method, mesh, our_params(state, config.model))
        self._frozen = {BASE: base}
        tokens = work.tokens()
        shape = (work.batch, work.length)
        self.batch = Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            positions=np.broadcast_to(np.arange(work.length, dtype=np.int32), shape),
            segment_ids=np.ones(shape, np.int32),
            loss_mask=np.ones(shape, np.float32),
        )
        self._step = build_train_step(method, update, update.abstract_state(mesh), config.layout)
        self._evaluate = build_evaluation_step(method)

    def loss(self) -> float:
        sums = self._evaluate(self.state.trainable, self._frozen, self.batch)
        return float(sums["cross_entropy"] / sums["targets"])

    def step(self) -> None:
        self.state, metrics = self._step(self.state, self._frozen, self.batch)
        metrics["loss"].block_until_ready()


if __name__ == "__main__":
    main()
