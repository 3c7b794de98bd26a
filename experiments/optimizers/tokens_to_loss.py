"""Compares how many tokens each optimizer needs to reach AdamW's best validation loss.

    gemma2 run optimizers
    python experiments/optimizers/tokens_to_loss.py

For each pair of runs of the study with the same model, method and seed, AdamW's lowest validation cross-entropy is the
goal. Muon reaches it after the tokens at which its validation curve, linear between evaluations, first falls to the
goal. Prints the mean over seeds and, in brackets, the lowest and the highest value.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from gemma2_jax.config import UserError
from gemma2_jax.training.metrics import read_metrics

Curve = list[tuple[float, float]]  # tokens and validation cross-entropy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"), help="folder of the study")
    study = parser.parse_args().runs
    folders = sorted(study.glob("*_adamw-*"))
    if not folders:
        raise UserError(f"{study} holds no runs of the study; train them first: `gemma2 run optimizers`.")
    print("| setting | AdamW's best loss | Muon's best loss | Muon's tokens to AdamW's | share of AdamW's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for setting in dict.fromkeys(folder.name.split("_adamw-")[0] for folder in folders):
        print_row(setting, [folder for folder in folders if folder.name.startswith(f"{setting}_adamw-")])


def print_row(setting: str, folders: Sequence[Path]) -> None:
    """Prints the row of a setting, whose AdamW runs are in `folders`, one for each seed."""
    found = []
    for folder in folders:
        adamw = validation_curve(folder)
        muon = validation_curve(folder.with_name(folder.name.replace("_adamw-", "_muon-")))
        tokens, best = min(adamw, key=lambda point: point[1])
        found.append((best, tokens, tokens_to(best, muon), min(loss for _, loss in muon)))
    bests, tokens, needed, others = zip(*found, strict=True)
    cells = [setting, spread(bests, ".4f"), spread(others, ".4f")]
    if None in needed:
        cells += [f"not reached by {needed.count(None)} of {len(needed)}", "–"]
    else:
        ratios = [one / other for one, other in zip(needed, tokens, strict=True)]
        cells += [spread(needed, ",.0f"), spread(ratios, ".2f")]
    print(f"| {' | '.join(cells)} |")


def validation_curve(folder: Path) -> Curve:
    """Returns the tokens seen and the cross-entropy at each evaluation of a run.

    Raises:
        UserError: the folder holds no finished run.
    """
    rows = read_metrics(folder)
    tokens = {row["step"]: row["tokens_seen"] for row in rows if row["split"] == "train"}
    curve = [
        (tokens[row["step"]], row["cross_entropy"])
        for row in rows
        if row["split"] == "validation" and row["step"] in tokens
    ]
    if not curve:
        raise UserError(f"{folder} has no evaluations; train it first: `gemma2 run optimizers`.")
    return curve


def tokens_to(goal: float, curve: Curve) -> float | None:
    """Returns the tokens at which a curve first falls to the goal, None if it never does."""
    tokens, loss = curve[0]
    if loss <= goal:
        return tokens
    for later, lower in curve[1:]:
        if lower <= goal:
            return tokens + (later - tokens) * (loss - goal) / (loss - lower)
        tokens, loss = later, lower
    return None


def spread(values: Sequence[float], form: str) -> str:
    """Returns the mean of the values, with the lowest and the highest."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    try:
        main()
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"tokens_to_loss.py: {error}")
