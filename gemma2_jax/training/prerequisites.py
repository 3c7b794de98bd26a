"""Checks of a run's input and output paths, made before the slow steps: data preparation and compilation."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from gemma2_jax.checkpoints.store import latest_step
from gemma2_jax.config import check_place
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.formats.load import check_readable
from gemma2_jax.run import RunConfig


def check_places(config: RunConfig) -> None:
    """Raises UserError if a path that a run writes to cannot be created, for example because a parent is a file."""
    for key, path in _outputs(config):
        check_place(key, path, is_file=key == "tokenizer.path")


def check_places_below(folder: str, config: RunConfig) -> None:
    """As `check_places`, for a run whose working directory will be `folder`: checks only the relative paths.

    An absolute path may be on a disk that only the run's machines have.
    """
    for key, path in _outputs(config):
        if not Path(path).is_absolute():
            check_place(key, Path(folder, path), is_file=key == "tokenizer.path")


def _outputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The keys of the paths that the run writes to, and the paths."""
    yield "output", config.output
    yield "data.folder", config.data.folder
    yield "tokenizer.path", config.tokenizer.path
    if config.distill.cache is not None:
        yield "distill.cache", config.distill.cache
    if config.compilation_cache is not None and "://" not in config.compilation_cache:
        yield "compilation_cache", config.compilation_cache


def check_sources(configs: Iterable[RunConfig], made: Collection[str] = ()) -> None:
    """Raises UserError if a teacher, cache or initial checkpoint is missing, damaged, or has another tokenizer.

    Call it after the processes of a job have joined, since it may use JAX.

    Args:
        made: keys of paths that the command itself creates; they are not checked.
    """
    checked = set()
    for config in configs:
        if latest_step(config.output) == config.training.steps:
            continue
        for key, path in sources(config).items():
            if key not in made and (key, path, config.tokenizer.path) not in checked:
                checked.add((key, path, config.tokenizer.path))
                _check_source(config, key, path)


def sources(config: RunConfig) -> dict[str, str]:
    """The paths of the weights and of the teacher's cache that a run reads when it starts or resumes, by their keys."""
    found = {"distill.teacher": config.distill.teacher, "distill.cache": config.distill.cache}
    if config.adaptation.has_base or latest_step(config.output) is None:
        found["initialise.source"] = config.initialise.source
    return {key: path for key, path in found.items() if path is not None}


def _check_source(config: RunConfig, key: str, path: str) -> None:
    if key == "distill.cache":
        read_cache(path)
    else:
        check_readable(key, path, config.tokenizer.path)
