"""Counts the held-out questions that each run of the study answers exactly.

    python experiments/finetune/exact_match.py

Each run in runs/finetune (or --runs) answers the questions of runs/finetune/held_out.jsonl, which questions.py wrote
and no run was trained on, by its most likely tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import gemma2_jax as g2
from gemma2_jax.data.chat_format import render


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"), help="folder of the study")
    study = parser.parse_args().runs
    lines = (study / "held_out.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    prompts = [render([question], generation_prompt=True) for question, _ in chats]
    greedy = g2.SamplingConfig(temperature=0.0, max_new_tokens=24)
    print(f"| run | exact answers of {len(chats)} | % |\n| --- | ---: | ---: |")
    for folder in sorted(path.parent for path in study.glob("*/config.yaml")):
        sampler = g2.Sampler(*g2.load(folder))
        *_, completions = sampler.complete(prompts, greedy)
        exact = sum(
            completion.text == answer["content"]
            for completion, (_, answer) in zip(completions, chats, strict=True)
        )
        print(f"| {folder.name} | {exact} | {100 * exact / len(chats):.1f} |")


if __name__ == "__main__":
    try:
        main()
    except (g2.UserError, FileNotFoundError) as error:
        sys.exit(f"exact_match.py: {error}")
