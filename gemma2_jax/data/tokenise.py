"""Converts documents to token ids, in several processes.

Neither this file nor its imports may import JAX: a worker must start fast and not touch the accelerator.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.config import ConversationsConfig
from gemma2_jax.data.conversations import from_document, text_of
from gemma2_jax.data.lengths import Lengths, lengths_of
from gemma2_jax.data.masks import encode_conversation, to_record
from gemma2_jax.data.shards import Counts, token_dtype
from gemma2_jax.data.tokenizer import Tokenizer

Task = tuple[list[str], int]  # documents, and the bytes of source read up to their end


@dataclass(frozen=True)
class Tokenised:
    """One document ready to be written: its record, its split, its counts, and the lengths of a conversation."""

    record: bytes
    validation: bool
    counts: Counts
    lengths: Lengths | None = None


def chance(text: str, purpose: str) -> float:
    """Returns a hash of the content in [0, 1), the same in any order, run and machine; `purpose` salts it."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48  # a float holds 48 bits exactly, so the result is never 1.0


def is_validation(text: str, validation_fraction: float) -> bool:
    """Returns whether a document is held out."""
    return chance(text, "validation") < validation_fraction


def tokenise(tokenizer: Tokenizer, text: str, validation_fraction: float) -> Tokenised:
    """Returns a document with its record (bos, its tokens, eos), its split and its counts."""
    ids = tokenizer.encode(text, bos=True, eos=True)
    return Tokenised(
        record=np.array(ids, token_dtype(tokenizer.vocab_size)).tobytes(),
        validation=is_validation(text, validation_fraction),
        counts=Counts(documents=1, tokens=len(ids), characters=len(text), bytes=len(text.encode())),
    )


def tokenise_conversation(
    tokenizer: Tokenizer, document: str, validation_fraction: float, config: ConversationsConfig
) -> Tokenised:
    """Returns a conversation with its record (tokens and loss mask), its split, its counts and its lengths."""
    tokens, text = encode_conversation(tokenizer, from_document(document), config), text_of(document)
    return Tokenised(
        record=to_record(tokens, token_dtype(tokenizer.vocab_size)),
        validation=is_validation(document, validation_fraction),
        counts=Counts(documents=1, tokens=len(tokens.ids), characters=len(text), bytes=len(text.encode())),
        lengths=lengths_of(tokens, tokenizer.end_of_turn_id),
    )


def tokenise_all(
    tasks: Iterable[Task],
    tokenizer_path: str,
    validation_fraction: float,
    workers: int,
    conversations: ConversationsConfig | None = None,
) -> Iterator[tuple[Task, list[Tokenised]]]:
    """Yields each task with its tokenised documents, in order, reading only a few tasks ahead.

    With one worker, this process tokenises; more workers are separate processes.

    Args:
        conversations: settings of documents that are conversations; None for text.
    """
    if workers > 1:
        yield from _in_workers(tasks, tokenizer_path, validation_fraction, workers, conversations)
        return
    work = _tokeniser(tokenizer_path, validation_fraction, conversations)
    for task in tasks:
        yield task, [work(document) for document in task[0]]


def _tokeniser(
    tokenizer_path: str, validation_fraction: float, conversations: ConversationsConfig | None
) -> Callable[[str], Tokenised]:
    """Returns the function that tokenises one document."""
    tokenizer = Tokenizer.load(tokenizer_path)
    if conversations is None:
        return lambda text: tokenise(tokenizer, text, validation_fraction)
    return lambda document: tokenise_conversation(tokenizer, document, validation_fraction, conversations)


def _in_workers(
    tasks: Iterable[Task],
    tokenizer_path: str,
    validation_fraction: float,
    workers: int,
    conversations: ConversationsConfig | None,
) -> Iterator[tuple[Task, list[Tokenised]]]:
    pending: deque[tuple[Task, Future[list[Tokenised]]]] = deque()
    # spawn: a process that has loaded JAX has threads, so a fork of it may hang.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (tokenizer_path, validation_fraction, conversations),
    )
    try:
        for task in tasks:
            # `submit` may start a worker, which inherits the mask: from its start on, only the parent handles Ctrl-C.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append((task, pool.submit(_work, task[0])))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if len(pending) == 2 * workers:  # enough to keep them busy without filling memory
                task, future = pending.popleft()
                yield task, future.result()
        for task, future in pending:
            yield task, future.result()
    except BrokenProcessPool:
        raise UserError(
            "A tokenising process died; in a script, call prepare under "
            '`if __name__ == "__main__":`, otherwise set data.workers=1.'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_tokenise_one: Callable[[str], Tokenised] | None = None


def _start_worker(
    tokenizer_path: str, validation_fraction: float, conversations: ConversationsConfig | None
) -> None:
    global _tokenise_one
    _tokenise_one = _tokeniser(tokenizer_path, validation_fraction, conversations)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; otherwise it would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(documents: list[str]) -> list[Tokenised]:
    assert _tokenise_one is not None
    return [_tokenise_one(document) for document in documents]
