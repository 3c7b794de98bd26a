"""Source to shards: train the tokenizer if there is none, tokenise in parallel, write what is missing.

    manifest = prepare(config.data, config.tokenizer)

The source is read as a stream. It is cut into parts, each of which becomes one shard for each split. The
manifest is rewritten after every part, so that a preparation that was stopped goes on with the part it was in.
"""

import hashlib
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import (
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.shards import (
    FORMAT,
    Manifest,
    Part,
    ShardWriter,
    find_manifest,
    write_manifest,
)
from gemma2_jax.data.sources import Source, open_source
from gemma2_jax.data.tokenise import Task, Tokenised, chance, is_validation, tokenise_all
from gemma2_jax.data.tokenizer import Tokenizer, train_tokenizer
from gemma2_jax.files import locked
from gemma2_jax.machine import cores

TRAINING_BYTES = 100_000_000  # of source that a tokenizer is trained on; of a larger one, a sample by content
_TASK_CHARACTERS = 100_000  # sent to a worker at once: some tens of milliseconds of its time


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> Manifest:
    """Makes `data.folder` hold the tokenised source, and returns its manifest; at once if it does already.

    Shows a progress bar if standard error is a terminal, else a line for each stage, and one line of summary.
    Processes that start at the same time wait for one another. In a script, call this under
    `if __name__ == "__main__":`, since workers import the script anew; or set `data.workers` to 1.

    Raises:
        UserError: the folder was prepared from another source, tokenizer or validation fraction; the tokenizer
            or the source cannot be read; a split gets no document.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker importing an unguarded script: its parent says so, and must not be waited for
    folder = Path(data.folder)
    manifest = find_manifest(folder)
    if manifest is not None and manifest.complete and Path(tokenizer.path).exists():
        _refuse_other(manifest, data, _load(tokenizer), _identity_now(data))
        return manifest
    with locked(folder, wait=True), _progress() as progress:
        return _prepare(data, tokenizer, folder, progress)


def _prepare(data: DataConfig, tokenizer: TokenizerConfig, folder: Path, progress: Progress) -> Manifest:
    begun = time.monotonic()
    source = open_source(data.sources, data.text_field)
    loaded = _load(tokenizer) if Path(tokenizer.path).exists() else _train(data, tokenizer, source, progress)
    manifest = find_manifest(folder)
    if manifest is None:
        manifest = Manifest(
            format=FORMAT,
            complete=False,
            source=data.sources,
            text_field=data.text_field,
            validation_fraction=data.validation_fraction,
            identity=source.identity,
            tokenizer=loaded.fingerprint,
            vocab_size=loaded.vocab_size,
            parts=(),
        )
    _refuse_other(manifest, data, loaded, source.identity)
    if manifest.complete:
        return manifest

    stream = iter(source)
    for part in manifest.parts:
        _skip(stream, part, folder)
    _announce(progress, f"{folder}: tokenising {source.size:,} bytes")
    task = progress.add_task("tokenising", total=source.size)
    tasks = _tasks(stream, min(_TASK_CHARACTERS, data.shard_characters))
    for part in _parts(
        _tokenised(tasks, data, tokenizer.path, progress, task), data, folder, len(manifest.parts)
    ):
        manifest = replace(manifest, parts=(*manifest.parts, part))
        write_manifest(folder, manifest)

    _refuse_empty(manifest, folder)
    manifest = replace(manifest, complete=True)
    write_manifest(folder, manifest)
    train, validation = manifest.train, manifest.validation
    progress.console.print(
        f"{folder}: {train.documents:,} documents of {train.tokens:,} tokens to train on, {validation.documents:,} of "
        f"{validation.tokens:,} held out, prepared in {time.monotonic() - begun:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    return manifest


def _load(tokenizer: TokenizerConfig) -> Tokenizer:
    loaded = Tokenizer.load(tokenizer.path)
    if tokenizer.vocab_size not in (None, loaded.vocab_size):
        raise UserError(
            f"tokenizer.vocab_size is {tokenizer.vocab_size}, but {tokenizer.path} has {loaded.vocab_size} tokens; "
            "set tokenizer.path to a new file to train another."
        )
    return loaded


def _train(data: DataConfig, tokenizer: TokenizerConfig, source: Source, progress: Progress) -> Tokenizer:
    if tokenizer.vocab_size is None:
        raise UserError(
            f"There is no tokenizer file {tokenizer.path}; set tokenizer.path to one, or tokenizer.vocab_size to "
            "the number of tokens to train one with."
        )
    _announce(progress, f"{tokenizer.path}: training a tokenizer of {tokenizer.vocab_size:,} tokens")
    progress.add_task("training the tokenizer", total=None)
    share = TRAINING_BYTES / max(source.size, 1)
    # Only documents of the training split: what is held out must not have shaped the tokenizer either.
    documents = (
        text
        for text, _ in source
        if not is_validation(text, data.validation_fraction) and chance(text, "tokenizer") < share
    )
    trained = train_tokenizer(documents, tokenizer.path, tokenizer.vocab_size)
    for task in progress.task_ids:
        progress.remove_task(task)
    return trained


def _identity_now(data: DataConfig) -> str | None:
    """What the source is at present; None if it is gone, which a prepared folder may outlive."""
    try:
        return open_source(data.sources, data.text_field).identity
    except UserError:
        return None


def _refuse_other(manifest: Manifest, data: DataConfig, tokenizer: Tokenizer, identity: str | None) -> None:
    for key, was, is_now in (
        ("data.source", list(manifest.source), list(data.sources)),
        ("data.text_field", manifest.text_field, data.text_field),
        ("data.validation_fraction", manifest.validation_fraction, data.validation_fraction),
        ("the tokenizer", manifest.tokenizer[:12], tokenizer.fingerprint[:12]),
        ("the content of data.source", manifest.identity, identity or manifest.identity),
    ):
        if was != is_now:
            raise UserError(
                f"data.folder {data.folder} was prepared with another value of {key} ({was}, now {is_now}); "
                "set data.folder to another folder, or delete this one."
            )


def _refuse_empty(manifest: Manifest, folder: Path) -> None:
    train, validation = manifest.train.documents, manifest.validation.documents
    if train + validation == 0:
        raise UserError(f"data.source {list(manifest.source)} holds no text.")
    if train == 0 or (validation == 0 and manifest.validation_fraction > 0):
        raise UserError(
            f"data.validation_fraction {manifest.validation_fraction} leaves {train} documents to train on and "
            f"{validation} to validate on; change it, and delete {folder}."
        )


def _skip(stream: Iterator[tuple[str, int]], part: Part, folder: Path) -> None:
    """Reads past the documents of a part that is done, making sure that they are still the same."""
    digest = hashlib.sha256()
    for _ in range(part.documents):
        text, _ = next(stream, ("", 0))
        _add_text(digest, text)
    if digest.hexdigest() != part.sha256:
        raise UserError(
            f"data.source has changed since the preparation of {folder} was stopped; delete that folder."
        )


def _tasks(stream: Iterator[tuple[str, int]], characters: int) -> Iterator[Task]:
    """Groups documents into tasks."""
    texts: list[str] = []
    length = position = 0
    for text, position in stream:
        texts.append(text)
        length += len(text)
        if length >= characters:
            yield texts, position
            texts, length = [], 0
    if texts:
        yield texts, position


def _tokenised(
    tasks: Iterable[Task], data: DataConfig, tokenizer_path: str, progress: Progress, task: TaskID
) -> Iterator[tuple[str, Tokenised]]:
    """Yields documents with what they became, in their order."""
    workers = data.workers or cores()
    for (texts, position), done in tokenise_all(tasks, tokenizer_path, data.validation_fraction, workers):
        yield from zip(texts, done, strict=True)
        progress.update(task, completed=position)


def _parts(
    documents: Iterator[tuple[str, Tokenised]], data: DataConfig, folder: Path, first: int
) -> Iterator[Part]:
    """Writes documents to shards; yields each part when its shards are in their places."""
    number, more = first, True
    while more:
        digest, taken, characters = hashlib.sha256(), 0, 0
        writers: dict[bool, ShardWriter] = {}
        try:
            while characters < data.shard_characters:
                text, done = next(documents, (None, None))
                if text is None or done is None:
                    more = False
                    break
                if done.validation not in writers:
                    split = "validation" if done.validation else "train"
                    writers[done.validation] = ShardWriter(folder / f"{split}-{number:05d}.arrayrecord")
                writers[done.validation].write(done.record, done.counts)
                _add_text(digest, text)
                taken += 1
                characters += len(text)
            shards = {held_out: writer.finish() for held_out, writer in writers.items()}
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        if taken:
            yield Part(taken, digest.hexdigest(), shards.get(False), shards.get(True))
            number += 1


def _add_text(digest: "hashlib._Hash", text: str) -> None:
    content = text.encode()
    digest.update(len(content).to_bytes(8))
    digest.update(content)


def _announce(progress: Progress, what: str) -> None:
    """A line in a log, where there is no bar to tell what takes so long."""
    if progress.disable:
        progress.console.print(f"{what} …", soft_wrap=True, highlight=False, markup=False)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn("line"),  # in ASCII
        TextColumn("{task.description}"),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
        transient=True,
    )
