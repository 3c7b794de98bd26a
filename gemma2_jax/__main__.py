"""`python -m gemma2_jax`: the console script `gemma2`."""

import sys

from gemma2_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
