"""Measures what each encoding of GGUF costs a model: bytes, perplexity, and KL divergence from the original.

    pip install -e '.[gguf]'
    python experiments/benchmarks/gguf_quality.py runs/MODEL --text 'books/*.txt' --calibrate 'notes/*.md'

Writes the model in every encoding, those of the K types also with --calibrate, into a folder that is deleted at the
end, and evaluates the files, dequantised, on --text.
"""

import argparse
import tempfile
from pathlib import Path

from gemma2_jax.evaluation.calibration import Calibration
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.evaluate import evaluate
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.gguf_encodings import CALIBRATED

DTYPES = ("float16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint of any kind")
    parser.add_argument("--text", required=True, metavar="GLOB", help="text to evaluate on")
    parser.add_argument("--calibrate", required=True, metavar="DATA", help="other text, or prepared data")
    parser.add_argument("--context", type=int, default=64, help="tokens in a window")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = {}
        for dtype in DTYPES:
            files[dtype] = Path(name, f"{dtype}.gguf")
            convert(arguments.model, files[dtype], dtype=dtype)
            if dtype in CALIBRATED:
                files[f"{dtype}, calibrated"] = Path(name, f"{dtype}-calibrated.gguf")
                calibration = Calibration(arguments.calibrate)
                convert(arguments.model, files[f"{dtype}, calibrated"], dtype=dtype, calibrate=calibration)
        config = EvaluationConfig(text=(arguments.text,), teacher=arguments.model, context=arguments.context)
        record = evaluate(list(files.values()), config)
        print(f"{'':20}{'bytes':>12}{'perplexity':>12}{'KL':>12}{'agreement':>12}")
        for (label, file), row in zip(files.items(), record.rows, strict=True):
            scores = row.scores[config.kind].total
            assert scores.perplexity is not None
            assert scores.kl is not None
            assert scores.agreement is not None
            print(
                f"{label:20}{file.stat().st_size:>12,}{scores.perplexity:>12.3f}{scores.kl:>12.6f}"
                f"{scores.agreement:>12.2%}"
            )


if __name__ == "__main__":
    main()
