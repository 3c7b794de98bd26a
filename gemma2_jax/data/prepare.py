"""Source to shards: train the tokenizer if there is none, tokenise in parallel, write what is missing.

    manifest = prepare(config.data, config.tokenizer)

The source is read as a stream. It is cut into parts, each of which becomes one shard for each split. The
manifest is rewritten after every part, so that a preparation that was stopped goes on with the part it was in.
"""

import hashlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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

from gemma2_jax import stops
from gemma2_jax.config import UserError, as_override, check_place, usable
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.globs import NothingMatchesError
from gemma2_jax.data.invalid import Skipped, check_skipped
from gemma2_jax.data.shards import (
    FORMAT,
    DataManifest,
    Part,
    ShardWriter,
    find_data_manifest,
    read_data_manifest,
    write_data_manifest,
)
from gemma2_jax.data.source_content import (
    content_now,
    content_of,
    difference,
    free_beside,
    read_seen,
    refuse_other_content,
    unchanged,
    write_seen,
)
from gemma2_jax.data.sources import Documents, open_documents
from gemma2_jax.data.split import divide
from gemma2_jax.data.tokenise import Task, Tokenised, chance, is_validation, tokenise_all
from gemma2_jax.data.tokenizer import Tokenizer, VocabularyTooLargeError, train_tokenizer
from gemma2_jax.files import locked, undone_after
from gemma2_jax.machine import cores

TRAINING_BYTES = 100_000_000  # of source that a tokenizer is trained on; of a larger one, a sample by content
_TASK_CHARACTERS = 100_000  # sent to a worker at once: some tens of milliseconds of its time


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> DataManifest:
    """Makes `data.folder` hold the tokenised source, and returns its manifest; at once if it does already.

    Shows a progress bar if standard error is a terminal, else a line for each stage, and one line of summary.
    Processes that start at the same time wait for one another. In a script, call this under
    `if __name__ == "__main__":`, since workers import the script anew; or set `data.workers` to 1.

    The tokenizer may have fewer tokens than `tokenizer.vocab_size`, if the text supports no more: see the manifest's
    `vocab_size`. After a UserError nothing is left of what was made, unless a whole shard of it can be gone on from.

    Raises:
        UserError: the folder was prepared from other content, with another tokenizer or validation fraction; the
            tokenizer or the source cannot be read, or changed meanwhile; there is no text.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker importing an unguarded script: its parent says so, and must not be waited for
    folder = Path(data.folder)
    check_place("data.folder", folder)
    check_place("tokenizer.path", tokenizer.path, is_file=True)
    manifest = find_data_manifest(folder)
    if manifest is not None and manifest.complete and Path(tokenizer.path).exists():
        _refuse_other(manifest, data, _load(tokenizer, manifest))
        with _progress() as progress:
            refuse_other_content(manifest, data, content_now(manifest, data, progress))
        _refuse_other_skips(manifest, data)
        return manifest

    def has_parts() -> bool:
        manifest = find_data_manifest(folder)
        return manifest is not None and len(manifest.parts) > 0

    with ExitStack() as stack:
        stack.enter_context(stops.resuming(partial(_goes_on, folder)))
        with usable("data.folder", folder):
            stack.enter_context(locked(folder, wait=True))
        stack.enter_context(undone_after(UserError, folder, Path(tokenizer.path), unless=has_parts))
        return _prepare(data, tokenizer, folder, stack.enter_context(_progress()))


def verify_source(folder: str | os.PathLike[str]) -> bool:
    """Reads the files that a folder was prepared from anew; returns whether they are still there.

    Raises:
        UserError: their content has changed; or as `read_data_manifest`.
    """
    manifest = read_data_manifest(folder)
    try:
        source = open_documents(manifest.source, manifest.text_field, skip_invalid=math.inf)
    except NothingMatchesError:
        return False
    with _progress() as progress:
        content = content_of(source, (), progress)
    if content.identity != manifest.identity:
        changed = difference(manifest.identity, read_seen(Path(folder)), content)
        raise UserError(
            f"data.source {list(manifest.source)} has changed since data.folder {folder} was prepared ({changed}); "
            "delete that folder to prepare it anew, or restore the files."
        )
    return True


def _prepare(data: DataConfig, tokenizer: TokenizerConfig, folder: Path, progress: Progress) -> DataManifest:
    begun = time.monotonic()
    opened = open_documents(data.sources, data.text_field, data.skip_invalid)
    # Before anything is made of it: what changes later is noticed in the end.
    content = content_of(opened, read_seen(folder), progress)
    manifest = find_data_manifest(folder)
    if manifest is not None and (manifest.complete or manifest.tokenizer_trained):
        refuse_other_content(manifest, data, content)
    source, held_out_below = divide(opened, data.sources, data.validation_fraction)
    trains = not Path(tokenizer.path).exists()
    loaded = _train(held_out_below, tokenizer, source, progress) if trains else _load(tokenizer, manifest)
    if manifest is None or not manifest.parts:
        manifest = DataManifest(
            format=FORMAT,
            complete=False,
            source=data.sources,
            text_field=data.text_field,
            validation_fraction=data.validation_fraction,
            identity=content.identity,
            tokenizer=loaded.fingerprint,
            tokenizer_trained=trains or _was_trained(loaded, manifest),
            vocab_size=loaded.vocab_size,
            skipped=Skipped(),
            parts=(),
            # A smaller one than asked for has just been trained, as large as could be, or is known to be.
            vocabulary_full=loaded.vocab_size < (tokenizer.vocab_size or 0) or _known_full(loaded, manifest),
        )
        # Before the first part is done, so that a preparation that is stopped in it finds its tokenizer again.
        write_data_manifest(folder, manifest)
    _refuse_other(manifest, data, loaded)
    _refuse_other_skips(manifest, data)
    if manifest.complete:
        return manifest

    # Parts that are there are compared by their text; behind them the source may have been mended.
    manifest = replace(manifest, source=data.sources, identity=content.identity)
    stream = iter(source)
    for part in manifest.parts:
        _skip(stream, part, folder)
    _announce(progress, f"{folder}: tokenising {source.size:,} bytes")
    task = progress.add_task("tokenising", total=source.size)
    tasks = _tasks(stream, min(_TASK_CHARACTERS, data.shard_characters))
    for part in _parts(
        _tokenised(tasks, data.workers, held_out_below, tokenizer.path, progress, task),
        data,
        folder,
        len(manifest.parts),
    ):
        manifest = replace(manifest, parts=(*manifest.parts, part))
        write_data_manifest(folder, manifest)
        if len(manifest.parts) == 1:
            write_seen(folder, content)  # not to be read again after a stop

    content = unchanged(opened, content, folder, progress)
    manifest = replace(manifest, complete=True, skipped=opened.skipped)
    write_data_manifest(folder, manifest)
    write_seen(folder, content)
    train, validation = manifest.train, manifest.validation
    if manifest.skipped.records:
        progress.console.print(
            f"{folder}: left out {manifest.skipped}", soft_wrap=True, highlight=False, markup=False
        )
    progress.console.print(
        f"{folder}: {train.documents:,} documents of {train.tokens:,} tokens to train on, {validation.documents:,} of "
        f"{validation.tokens:,} held out, prepared in {time.monotonic() - begun:.1f} s",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return manifest


def _goes_on(folder: Path) -> str:
    """What the same command does after a stop."""
    manifest = find_data_manifest(folder)
    if manifest is None or not manifest.parts:
        return f"nothing of {folder} is prepared yet, and the same command begins anew"
    documents = manifest.train.documents + manifest.validation.documents
    return f"{documents:,} documents of {folder} are prepared, and the same command goes on behind them"


def _was_trained(loaded: Tokenizer, manifest: DataManifest | None) -> bool:
    """Whether the folder's manifest says that this tokenizer was trained on its source."""
    return manifest is not None and manifest.tokenizer_trained and manifest.tokenizer == loaded.fingerprint


def _known_full(loaded: Tokenizer, manifest: DataManifest | None) -> bool:
    """Whether the folder's manifest says that the text supports no larger vocabulary than this tokenizer's."""
    return manifest is not None and manifest.vocabulary_full and manifest.tokenizer == loaded.fingerprint


def _load(tokenizer: TokenizerConfig, manifest: DataManifest | None) -> Tokenizer:
    loaded = Tokenizer.load(tokenizer.path)
    asked = tokenizer.vocab_size
    if asked is None or asked == loaded.vocab_size:
        return loaded
    if asked < loaded.vocab_size or not _known_full(loaded, manifest):
        raise UserError(
            f"tokenizer.vocab_size is {asked}, but {tokenizer.path} has {loaded.vocab_size} tokens; set it to that "
            "number, or set tokenizer.path to a new file to train another."
        )
    return loaded


def _train(
    held_out_below: float, tokenizer: TokenizerConfig, source: Documents, progress: Progress
) -> Tokenizer:
    if tokenizer.vocab_size is None:
        raise UserError(
            f"There is no tokenizer file {tokenizer.path}; set tokenizer.path to one, or tokenizer.vocab_size to "
            "the number of tokens to train one with."
        )
    _announce(progress, f"{tokenizer.path}: training a tokenizer of {tokenizer.vocab_size:,} tokens")
    progress.add_task("training the tokenizer", total=None)
    share = TRAINING_BYTES / max(source.size, 1)

    def documents() -> Iterator[str]:
        """Of the training split alone: what is held out must not have shaped the tokenizer either."""
        for text, _ in source:
            if not is_validation(text, held_out_below) and chance(text, "tokenizer") < share:
                yield text

    def train(vocab_size: int) -> Tokenizer:
        with usable("tokenizer.path", tokenizer.path):
            return train_tokenizer(documents(), tokenizer.path, vocab_size)

    try:
        trained = train(tokenizer.vocab_size)
    except VocabularyTooLargeError as error:
        progress.console.print(
            f"tokenizer.vocab_size is {tokenizer.vocab_size}, but this text supports at most {error.most}; lowered to "
            f"{error.most}.",
            soft_wrap=True,
            highlight=False,
        )
        trained = train(error.most)
    for task in progress.task_ids:
        progress.remove_task(task)
    return trained


def _refuse_other(manifest: DataManifest, data: DataConfig, tokenizer: Tokenizer) -> None:
    values = (
        ("data.text_field", manifest.text_field, data.text_field),
        ("data.validation_fraction", manifest.validation_fraction, data.validation_fraction),
        ("the tokenizer", manifest.tokenizer[:12], tokenizer.fingerprint[:12]),
    )
    others = [f"another value of {key} ({was}, now {is_now})" for key, was, is_now in values if was != is_now]
    if others:
        typed = [as_override(key, was) for key, was, is_now in values[:2] if was != is_now]
        remedy = (
            f"write {' '.join(filter(None, typed))} to use it, "
            if any(typed) and len(typed) == len(others)
            else ""
        )
        raise UserError(
            f"data.folder {data.folder} was prepared with {', '.join(others)}; {remedy}set another folder, as in "
            f"data.folder={free_beside(Path(data.folder))}, or delete this one."
        )


def _refuse_other_skips(manifest: DataManifest, data: DataConfig) -> None:
    """Raises UserError if more was left out than may be. Goes after the content is found to be the same."""
    check_skipped(manifest.skipped, data.skip_invalid, f"data.folder {data.folder} was prepared without {{}}")


def _skip(stream: Iterator[tuple[str, int]], part: Part, folder: Path) -> None:
    """Reads past the documents of a part that is done, making sure that they are still the same."""
    digest = hashlib.sha256()
    for _ in range(part.documents):
        text, _ = next(stream, ("", 0))
        _add_text(digest, text)
    if digest.hexdigest() != part.sha256:
        raise UserError(
            f"data.source has changed since the preparation of {folder} was stopped; delete {folder} "
            "and run the same command again."
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
    tasks: Iterable[Task],
    workers: int | None,
    held_out_below: float,
    tokenizer_path: str,
    progress: Progress,
    task: TaskID,
) -> Iterator[tuple[str, Tokenised]]:
    """Yields documents with what they became, in their order."""
    for (texts, position), done in tokenise_all(tasks, tokenizer_path, held_out_below, workers or cores()):
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
