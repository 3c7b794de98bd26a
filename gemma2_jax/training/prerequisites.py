"""What a run reads and where it writes, checked before minutes go into its data and its programs."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from gemma2_jax.checkpoints.store import latest_step
from gemma2_jax.config import check_place
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.formats.load import check_readable
from gemma2_jax.run import RunConfig


def check_places(config: RunConfig) -> None:
    """Raises UserError if a folder that a run writes to cannot be made, as below a file."""
    for key, path in _written(config):
        check_place(key, path, is_file=key == "tokenizer.path")


def check_places_below(folder: str, config: RunConfig) -> None:
    """As `check_places`, of a run that is to begin in another folder: what lies there, by relative paths.

    An absolute path may be that of a disk which only the run's machines have.
    """
    for key, path in _written(config):
        if not Path(path).is_absolute():
            check_place(key, Path(folder, path), is_file=key == "tokenizer.path")


def _written(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The keys that name what a run writes, and their paths."""
    yield "output", config.output
    yield "data.folder", config.data.folder
    yield "tokenizer.path", config.tokenizer.path
    if config.distill.cache is not None:
        yield "distill.cache", config.distill.cache
    if config.compilation_cache is not None and "://" not in config.compilation_cache:
        yield "compilation_cache", config.compilation_cache


def check_sources(configs: Iterable[RunConfig], made: Collection[str] = ()) -> None:
    """Raises UserError if a teacher, a cache or a checkpoint to begin with is missing, damaged or of another tokenizer.

    Call it after the processes of a job have joined, since it may use JAX.

    Args:
        made: keys of paths that the command itself makes, which are not checked.
    """
    checked = set()
    for config in configs:
        for key, path in _sources(config):
            if key not in made and (key, path, config.tokenizer.path) not in checked:
                checked.add((key, path, config.tokenizer.path))
                _check_source(config, key, path)


def _sources(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The keys that name what is still to be read, and their paths."""
    latest = latest_step(config.output)
    if latest == config.training.steps:
        return
    sources = {
        "distill.teacher": config.distill.teacher,
        "distill.cache": config.distill.cache,
        "initialise.source": config.initialise.source if latest is None else None,
    }
    for key, path in sources.items():
        if path is not None:
            yield key, path


def _check_source(config: RunConfig, key: str, path: str) -> None:
    if key == "distill.cache":
        read_cache(path)
    else:
        check_readable(key, path, config.tokenizer.path)
