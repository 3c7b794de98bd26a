"""Turns a source into shards: trains the tokenizer if there is none, tokenises in parallel, writes what is missing.

    manifest = prepare(config.data, config.tokenizer)

The source is read as a stream and cut into parts, each of which becomes one shard per split. The manifest is
rewritten after every part, so that a stopped preparation resumes with the part that it was writing.
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
    content_of,
    current_content,
    difference,
    read_hashes,
    refuse_other_content,
    unchanged,
    unused_sibling,
    write_hashes,
)
from gemma2_jax.data.sources import Documents, open_documents
from gemma2_jax.data.split import divide
from gemma2_jax.data.tokenise import Task, Tokenised, chance, is_validation, tokenise_all
from gemma2_jax.data.tokenizer import Tokenizer, VocabularyTooLargeError, train_tokenizer
from gemma2_jax.files import locked, undone_after
from gemma2_jax.machine import cores

TRAINING_BYTES = 100_000_000  # of source that a tokenizer is trained on; of more, a sample chosen by content
_TASK_CHARACTERS = 100_000  # sent to a worker at once: some tens of milliseconds of work


def prepare(data: DataConfig, tokenizer: TokenizerConfig) -> DataManifest:
    """Tokenises the source into `data.folder`, unless that is already done, and returns the folder's manifest.

    Prints one line per stage, or shows a progress bar if standard error is a terminal, and a summary line. Processes
    that prepare the same folder wait for one another. In a script, call this under `if __name__ == "__main__":`,
    since workers import the script again; or set `data.workers` to 1.

    If the text supports no more, the tokenizer has fewer tokens than `tokenizer.vocab_size`: see the manifest's
    `vocab_size`. After a UserError everything that was written is removed, unless it includes a complete shard from
    which the preparation can resume.

    Raises:
        UserError: the folder was prepared from other content, or with another tokenizer or validation fraction; the
            tokenizer or the source cannot be read, or changed meanwhile; there is no text.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker that imports an unguarded script; the parent prints the error
    folder = Path(data.folder)
    check_place("data.folder", folder)
    check_place("tokenizer.path", tokenizer.path, is_file=True)
    manifest = find_data_manifest(folder)
    if manifest is not None and manifest.complete and Path(tokenizer.path).exists():
        _refuse_other(manifest, data, _load(tokenizer, manifest))
        with _progress() as progress:
            refuse_other_content(manifest, data, current_content(manifest, data, progress))
        _refuse_other_skips(manifest, data)
        return manifest

    def has_parts() -> bool:
        manifest = find_data_manifest(folder)
        return manifest is not None and len(manifest.parts) > 0

    with ExitStack() as stack:
        stack.enter_context(stops.resuming(partial(_resume_message, folder)))
        with usable("data.folder", folder):
            stack.enter_context(locked(folder, wait=True))
        stack.enter_context(undone_after(UserError, folder, Path(tokenizer.path), unless=has_parts))
        return _prepare(data, tokenizer, folder, stack.enter_context(_progress()))


def verify_source(folder: str | os.PathLike[str]) -> bool:
    """Reads again the files that a folder was prepared from; returns False if they no longer exist, else True.

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
        changed = difference(manifest.identity, read_hashes(Path(folder)), content)
        raise UserError(
            f"data.source {list(manifest.source)} has changed since data.folder {folder} was prepared ({changed}); "
            "delete that folder to prepare it again, or restore the files."
        )
    return True


def _prepare(data: DataConfig, tokenizer: TokenizerConfig, folder: Path, progress: Progress) -> DataManifest:
    begun = time.monotonic()
    opened = open_documents(data.sources, data.text_field, data.skip_invalid)
    # Taken before the source is used, so that the comparison at the end finds any change in between.
    content = content_of(opened, read_hashes(folder), progress)
    manifest = find_data_manifest(folder)
    if manifest is not None and (manifest.complete or manifest.tokenizer_trained):
        refuse_other_content(manifest, data, content)
    source, threshold = divide(opened, data.sources, data.validation_fraction)
    trains = not Path(tokenizer.path).exists()
    loaded = _train(threshold, tokenizer, source, progress) if trains else _load(tokenizer, manifest)
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
            # The tokenizer is smaller than requested: the largest possible one was trained, now or by an earlier call.
            vocabulary_full=loaded.vocab_size < (tokenizer.vocab_size or 0) or _known_full(loaded, manifest),
        )
        # Before the first part, so that a preparation that is stopped during it recognises its tokenizer.
        write_data_manifest(folder, manifest)
    _refuse_other(manifest, data, loaded)
    _refuse_other_skips(manifest, data)
    if manifest.complete:
        return manifest

    # Only the text of existing parts is compared; the source after them may have been corrected.
    manifest = replace(manifest, source=data.sources, identity=content.identity)
    stream = iter(source)
    for part in manifest.parts:
        _skip(stream, part, folder)
    _announce(progress, f"{folder}: tokenising {source.size:,} bytes")
    task = progress.add_task("tokenising", total=source.size)
    tasks = _tasks(stream, min(_TASK_CHARACTERS, data.shard_characters))
    for part in _parts(
        _tokenised(tasks, data.workers, threshold, tokenizer.path, progress, task),
        data,
        folder,
        len(manifest.parts),
    ):
        manifest = replace(manifest, parts=(*manifest.parts, part))
        write_data_manifest(folder, manifest)
        if len(manifest.parts) == 1:
            write_hashes(folder, content)  # so that a resumed preparation need not read the files again

    content = unchanged(opened, content, folder, progress)
    manifest = replace(manifest, complete=True, skipped=opened.skipped)
    write_data_manifest(folder, manifest)
    write_hashes(folder, content)
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


def _resume_message(folder: Path) -> str:
    """Returns what is already prepared, and what the same command will do after a stop."""
    manifest = find_data_manifest(folder)
    if manifest is None or not manifest.parts:
        return f"nothing of {folder} is prepared yet, and the same command starts from the beginning"
    documents = manifest.train.documents + manifest.validation.documents
    return f"{documents:,} documents of {folder} are prepared, and the same command resumes after them"


def _was_trained(loaded: Tokenizer, manifest: DataManifest | None) -> bool:
    """Whether this tokenizer was trained on the folder's source, according to its manifest."""
    return manifest is not None and manifest.tokenizer_trained and manifest.tokenizer == loaded.fingerprint


def _known_full(loaded: Tokenizer, manifest: DataManifest | None) -> bool:
    """Whether the text supports no larger vocabulary than this tokenizer's, according to the folder's manifest."""
    return manifest is not None and manifest.vocabulary_full and manifest.tokenizer == loaded.fingerprint


def _load(tokenizer: TokenizerConfig, manifest: DataManifest | None) -> Tokenizer:
    loaded = Tokenizer.load(tokenizer.path)
    requested = tokenizer.vocab_size
    if requested is None or requested == loaded.vocab_size:
        return loaded
    if requested < loaded.vocab_size or not _known_full(loaded, manifest):
        raise UserError(
            f"tokenizer.vocab_size is {requested}, but {tokenizer.path} has {loaded.vocab_size} tokens; set it to that "
            "number, or set tokenizer.path to a new file to train another."
        )
    return loaded


def _train(threshold: float, tokenizer: TokenizerConfig, source: Documents, progress: Progress) -> Tokenizer:
    if tokenizer.vocab_size is None:
        raise UserError(
            f"There is no tokenizer file {tokenizer.path}; set tokenizer.path to an existing file, or "
            "tokenizer.vocab_size to the number of tokens of a new one to train."
        )
    _announce(progress, f"{tokenizer.path}: training a tokenizer of {tokenizer.vocab_size:,} tokens")
    progress.add_task("training the tokenizer", total=None)
    share = TRAINING_BYTES / max(source.size, 1)

    def documents() -> Iterator[str]:
        """Yields from the training split alone: held-out documents must not influence the tokenizer either."""
        for text, _ in source:
            if not is_validation(text, threshold) and chance(text, "tokenizer") < share:
                yield text

    def train(vocab_size: int) -> Tokenizer:
        with usable("tokenizer.path", tokenizer.path):
            return train_tokenizer(documents(), tokenizer.path, vocab_size)

    try:
        trained = train(tokenizer.vocab_size)
    except VocabularyTooLargeError as error:
        progress.console.print(
            f"tokenizer.vocab_size is {tokenizer.vocab_size}, but this text supports at most {error.largest}; lowered "
            f"to {error.largest}.",
            soft_wrap=True,
            highlight=False,
        )
        trained = train(error.largest)
    for task in progress.task_ids:
        progress.remove_task(task)
    return trained


def _refuse_other(manifest: DataManifest, data: DataConfig, tokenizer: Tokenizer) -> None:
    values = (
        ("data.text_field", manifest.text_field, data.text_field),
        ("data.validation_fraction", manifest.validation_fraction, data.validation_fraction),
        ("tokenizer", manifest.tokenizer[:12], tokenizer.fingerprint[:12]),
    )
    others = [f"a different {key} ({was}, now {now})" for key, was, now in values if was != now]
    if others:
        typed = [as_override(key, was) for key, was, now in values[:2] if was != now]
        remedy = (
            f"write {' '.join(filter(None, typed))} to use it, "
            if any(typed) and len(typed) == len(others)
            else ""
        )
        raise UserError(
            f"data.folder {data.folder} was prepared with {', '.join(others)}; {remedy}set another folder, as in "
            f"data.folder={unused_sibling(Path(data.folder))}, or delete this one."
        )


def _refuse_other_skips(manifest: DataManifest, data: DataConfig) -> None:
    """Raises UserError if more records were skipped than allowed. Call it after the content was compared."""
    check_skipped(manifest.skipped, data.skip_invalid, f"data.folder {data.folder} was prepared without {{}}")


def _skip(stream: Iterator[tuple[str, int]], part: Part, folder: Path) -> None:
    """Reads past the documents of a finished part. Raises UserError if they have changed."""
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
    threshold: float,
    tokenizer_path: str,
    progress: Progress,
    task: TaskID,
) -> Iterator[tuple[str, Tokenised]]:
    """Yields the text of each document with its tokenised form, in order."""
    for (texts, position), done in tokenise_all(tasks, tokenizer_path, threshold, workers or cores()):
        yield from zip(texts, done, strict=True)
        progress.update(task, completed=position)


def _parts(
    documents: Iterator[tuple[str, Tokenised]], data: DataConfig, folder: Path, first: int
) -> Iterator[Part]:
    """Writes documents to shards; yields each part once its shards have their final names."""
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
    """Prints a line about the next stage if there is no progress bar."""
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
