"""The biased cache that others keep, beside those of the study: top-k with the tail cut off and the rest brought to 1.

    gemma2 run teacher_source
    python experiments/teacher_source/renormalised.py          (with the same key=value as the study, if any)

For each seed, it copies the study's top-k cache without its tails, trains the same student from the copy, and writes
the study's report again with these runs in it. No option of the library makes such a cache: the weights are too large
by the tail's share, so that a student learns to be surer than its teacher.

Only the teacher's side is renormalised: its k probabilities are brought to a sum of 1, and are compared with the
student's softmax over the whole vocabulary, as by trainers that store top-k probabilities as soft labels. All other
tokens are thereby pushed down to nothing. The other common way, which is not measured here, brings both sides to a sum
of 1 over the k tokens: what the student gives to all others then has no gradient, and is left as it is.
"""

import dataclasses
import sys
from pathlib import Path

import grain
import numpy as np
from rich.console import Console

from gemma2_jax.cli.roots import find_study
from gemma2_jax.cli.run import compose_study
from gemma2_jax.config import UserError, load
from gemma2_jax.data.shards import RecordWriter
from gemma2_jax.distill.cache.encoding import Entries
from gemma2_jax.distill.cache.manifest import CacheFile, find_cache, write_cache_manifest
from gemma2_jax.distill.cache.packing import Packer
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.study import run_study

STUDY = "teacher_source"
WITH_TAIL, WITHOUT = "top_k_with_tail", "top_k_renormalised"


def renormalise(source: Path, target: Path) -> None:
    """Copies a top-k cache, with the probability of all other tokens set to nothing.

    Raises:
        UserError: there is none in `source`, or it is not whole.
    """
    if find_cache(target) is not None:
        return
    manifest = find_cache(source)
    if manifest is None:
        raise UserError(
            f"{source} holds no teacher's cache to copy; carry out the study before, by `gemma2 run {STUDY}` with the "
            "same key=value."
        )
    target.mkdir(parents=True, exist_ok=True)
    packer = Packer(manifest.encoding, manifest.grid, manifest.num_tokens, manifest.order.seq_len)
    files = []
    for file in manifest.files:
        records = grain.sources.ArrayRecordDataSource([str(source / file.file)])
        writer = RecordWriter(target / file.file, ",uncompressed")
        for number in range(len(records)):
            sparse, (checksum,) = packer.unpack([records[number]], manifest.largest)
            nothing = np.full(sparse.tail.shape[1:], manifest.grid.low, np.float32)
            # Read back, weights and tail are brought to a sum of 1.
            writer.write(packer.pack(Entries(sparse.ids[0], sparse.log_weights[0], nothing), checksum).record)
        written = writer.finish()
        files.append(
            CacheFile(written.file, written.size, written.sha256, file.process, file.rows, file.largest)
        )
    write_cache_manifest(target, dataclasses.replace(manifest, files=tuple(files)))


def main() -> None:
    study = load(StudyConfig, find_study(STUDY))
    with_tail = study.runs[WITH_TAIL]
    runs = {}
    for run, config in study.runs.items():
        runs[run] = config
        if run == WITH_TAIL:
            runs[WITHOUT] = with_tail
    study = dataclasses.replace(study, runs=runs)
    configs, output = compose_study(STUDY, study, sys.argv[1:], None)
    for seed in study.seeds:
        caches = Path(output) / "caches"
        renormalise(caches / f"{WITH_TAIL}-{seed}", caches / f"{WITHOUT}-{seed}")
    run_study(study, configs, output, Console())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"renormalised.py: {error}")
