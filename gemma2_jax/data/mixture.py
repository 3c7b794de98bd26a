"""Mixtures: several sources in one data set, each prepared in a folder of its own below `data.folder`."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.invalid import Skipped
from gemma2_jax.data.shards import (
    MIXTURE_FORMAT,
    DataManifest,
    Part,
    Shard,
    find_data_manifest,
    write_data_manifest,
)
from gemma2_jax.data.source_content import unused_sibling


def components(data: DataConfig) -> list[tuple[DataConfig, float]]:
    """Returns the data of each source of `data.mixture` and its weight; `data` itself if it is no mixture."""
    if not data.mixture:
        return [(data, 1.0)]
    return [
        (
            replace(
                data,
                source=part.source,
                folder=str(Path(data.folder) / str(number)),
                conversations=data.conversations if part.kind == "conversations" else None,
                mixture=(),
            ),
            part.weight,
        )
        for number, part in enumerate(data.mixture)
    ]


def prepare_mixture(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    prepare: Callable[[DataConfig, TokenizerConfig], DataManifest],
) -> DataManifest:
    """Prepares every source of a mixture and returns the manifest of all, which it writes to `data.folder`.

    Args:
        prepare: prepares one source.

    Raises:
        UserError: there is no tokenizer; the folder was prepared from something other than a mixture; or as `prepare`.
    """
    if not Path(tokenizer.path).exists():
        raise UserError(
            f"There is no tokenizer file {tokenizer.path}, which a mixture needs; set tokenizer.path to an existing "
            "file, or train one on a single source first (gemma2 tokenizer train)."
        )
    folder = Path(data.folder)
    found = find_data_manifest(folder)
    if found is not None and found.format != MIXTURE_FORMAT:
        raise UserError(
            f"data.folder {folder} was prepared from data.source, not from data.mixture; set another folder, as in "
            f"data.folder={unused_sibling(folder)}, or delete this one."
        )
    manifests = []
    for number, (part, _) in enumerate(components(data)):
        try:
            manifests.append(prepare(part, tokenizer))
        except UserError as error:
            raise UserError(f"data.mixture[{number}]: {error}") from None
    combined = _combined(data, manifests)
    if combined != found:
        write_data_manifest(folder, combined)
    return combined


def _combined(data: DataConfig, manifests: list[DataManifest]) -> DataManifest:
    digest = hashlib.sha256("\n".join(manifest.identity for manifest in manifests).encode())
    return replace(
        manifests[0],
        format=MIXTURE_FORMAT,
        source=tuple(source for manifest in manifests for source in manifest.source),
        identity=f"{digest.hexdigest()[:16]} ({len(manifests)} sources)",
        tokenizer_trained=False,
        vocabulary_full=False,
        skipped=_all_skipped([manifest.skipped for manifest in manifests]),
        parts=tuple(
            _below(str(number), part) for number, manifest in enumerate(manifests) for part in manifest.parts
        ),
        conversations=data.conversations if data.with_conversations else None,
    )


def _below(folder: str, part: Part) -> Part:
    """Returns a part whose files are below a folder."""

    def moved(shard: Shard | None) -> Shard | None:
        return shard and replace(shard, file=f"{folder}/{shard.file}")

    return replace(part, train=moved(part.train), validation=moved(part.validation))


def _all_skipped(each: list[Skipped]) -> Skipped:
    problems: dict[str, int] = {}
    for skipped in each:
        for problem, count in skipped.problems.items():
            problems[problem] = problems.get(problem, 0) + count
    return Skipped(
        sum(skipped.records for skipped in each),
        sum(skipped.of for skipped in each),
        problems,
        tuple(place for skipped in each for place in skipped.places),
    )
