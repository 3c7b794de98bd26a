"""Write the golden files: what Hugging Face's Gemma 2 computes, for tests where torch is not installed.

    pip install -e '.[reference]'
    python tests/golden/write.py

One file a released size, shrunk. It holds weights, inputs and everything of `tests/model/parity.py`. A second
run gives the same arrays but for rounding.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.model import reference
from tests.model.golden import FOLDER, SMALLEST, Golden
from tests.model.models import RELEASED, shrunk, vivid_weights
from tests.model.parity import batch_of, prompts_of

# Of weights and of prompts: under these rounding decides nothing.
SEEDS = {"2b": (0, 0), "9b": (9, 2), "27b": (12, 14)}


def main() -> None:
    for name in RELEASED:
        weights_seed, prompts_seed = SEEDS[name]
        config = shrunk(name, **SMALLEST[name])
        weights = vivid_weights(config, weights_seed)
        theirs = reference.build(config, weights)
        batch = batch_of([[3, 40, 17]], 64, config.vocab_size)
        with reference.largest_scores(config.sliding_window or 0) as largest:
            expected = reference.alone(theirs, batch)
        prompts = prompts_of(config.vocab_size, prompts_seed)
        continuations, least_lead = reference.continued(theirs, prompts)
        assert min(largest.values()) > 1.1, f"{name}: a soft cap does not bite: {largest}"
        assert least_lead > 5e-3, f"{name}: rounding may decide a token, two are {least_lead} apart"
        path = FOLDER / f"{name}.npz"
        Golden(config, weights, batch, expected, prompts, continuations).save(path)
        print(
            f"{path}: {path.stat().st_size:,} bytes; scores in units of the caps {largest}; {least_lead=:.4f}"
        )
        print(f"  {len(np.unique(continuations))} different tokens in the continuations")


if __name__ == "__main__":
    main()
