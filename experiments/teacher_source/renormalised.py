"""Adds a biased cache to the study: top-k targets without their tail, renormalised to a sum of 1.

    gemma2 run teacher_source
    python experiments/teacher_source/renormalised.py          (with the same key=value as the study, if any)

For each seed, the script copies the study's top-k cache without the tails, trains the same student from the copy, and
writes the study's report again, including these runs. No option of the library makes such a cache: the weights are too
large by the tail's share, so that a student becomes more confident than its teacher.

Only the teacher's side is renormalised: its k probabilities are scaled to a sum of 1 and compared with the student's
softmax over the whole vocabulary, as in trainers that store top-k probabilities as soft labels. This drives the
probability of all other tokens towards 0. The other common way, not measured here, renormalises both sides over the k
tokens: the student's probabilities of all other tokens then have no gradient.
"""

import dataclasses
import sys
from pathlib import Path

import grain
import numpy as np
from rich.console import Console

from gemma2_jax.cli.roots import find_study
from gemma2_jax.cli.run import compose_study
from gemma2_jax.config import UserError, load_config
from gemma2_jax.data.shards import RecordWriter
from gemma2_jax.distill.cache.encoding import Entries
from gemma2_jax.distill.cache.manifest import CacheFile, find_cache, write_cache_manifest
from gemma2_jax.distill.cache.records import Packer
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.study import run_study

STUDY = "teacher_source"
WITH_TAIL, WITHOUT = "top_k_with_tail", "top_k_renormalised"


def renormalise(source: Path, target: Path) -> None:
    """Copies a top-k cache with the probability of all other tokens set to 0.

    Raises:
        UserError: `source` holds no cache, or an incomplete one.
    """
    if find_cache(target) is not None:
        return
    manifest = find_cache(source)
    if manifest is None:
        raise UserError(
            f"{source} holds no teacher cache to copy; run the study first: `gemma2 run {STUDY}` with the same "
            "key=value."
        )
    target.mkdir(parents=True, exist_ok=True)
    packer = Packer(manifest.encoding, manifest.grid, manifest.num_tokens, manifest.order.seq_len)
    files = []
    for file in manifest.files:
        records = grain.sources.ArrayRecordDataSource([str(source / file.file)])
        writer = RecordWriter(target / file.file, ",uncompressed")
        for number in range(len(records)):
            sparse, (checksum,) = packer.unpack([records[number]], manifest.largest)
            no_tail = np.full(sparse.tail.shape[1:], manifest.grid.low, np.float32)
            # The reader normalises weights and tail to a sum of 1.
            writer.write(packer.pack(Entries(sparse.ids[0], sparse.log_weights[0], no_tail), checksum).record)
        written = writer.finish()
        files.append(
            CacheFile(written.file, written.size, written.sha256, file.process, file.rows, file.largest)
        )
    write_cache_manifest(target, dataclasses.replace(manifest, files=tuple(files)))


def main() -> None:
    study = load_config(StudyConfig, find_study(STUDY))
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
