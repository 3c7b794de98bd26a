"""What text is trained on (`DataConfig`) and the tokenizer that reads it (`TokenizerConfig`)."""

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2_jax.config import refuse

SMALLEST_VOCABULARY = 282  # of a tokenizer to train: 256 bytes, 25 pieces of its own, and one character


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, how it is stored, and how it becomes batches.

    Attributes:
        source: "python-docs" (the documentation in Python's own standard library), or one or several globs
            of .txt, .md, .rst, .jsonl or .parquet files, each optionally .gz or .zst. A line of JSONL and a row
            of Parquet are a document; a text file is cut at blank lines into documents of 4,000 characters or
            a little more, and is one if it is shorter.
        folder: where the tokenised shards and their manifest are kept; runs may share it.
        validation_fraction: share of the documents held out, in [0, 1); the content of a document decides. Above 0, at
            least one document is held out and one is left, if a lone document has to be cut for it.
        seq_len: T, tokens in a row of a batch.
        batch_size: B, rows of an optimizer step over all processes.
        seed: order of the documents and of the rows.
        text_field: the field of JSONL objects, or the column of Parquet files, that holds the text.
        workers: processes that tokenise; None is one for each CPU.
        shard_characters: a shard is closed after this many characters of text.
        streams: that the documents are divided among, each giving its share of every batch's rows; of them a process
            reads those of its rows only. With 1, each process reads everything.
        shuffle_buffer: rows that are held in memory and given in random order before the next as many are read, so
            that the rows of a long document are spread over many batches; at most the rows of one epoch. 0 gives the
            rows of a document one after another.
        skip_invalid: how many records of the source that cannot be read are left out, as a number of them, or below
            1 as a share of all; more are refused. A record is a line of JSONL, a row of Parquet, a document of a text
            file, or a file that holds none.
    """

    source: str | tuple[str, ...]
    folder: str
    validation_fraction: float
    seq_len: int
    batch_size: int
    seed: int
    text_field: str = "text"
    workers: int | None = None
    shard_characters: int = 64_000_000
    streams: int = 1
    shuffle_buffer: int = 0  # Older runs lack this key.
    skip_invalid: int | float = 0  # Older runs lack this key.

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        if not self.sources or not all(self.sources):
            yield f"data.source is {self.source!r}; accepted: python-docs, or one or several globs of files."
        if not self.folder:
            yield "data.folder is empty; it must name the folder that the prepared data goes to."
        if not 0 <= self.validation_fraction < 1:
            yield f"data.validation_fraction is {self.validation_fraction}; accepted: at least 0, below 1."
        if self.seq_len < 2:
            yield f"data.seq_len is {self.seq_len}; it must be at least 2."
        if not 0 <= self.seed < 2**32:
            yield f"data.seed is {self.seed}; it must be at least 0 and below 2**32."
        for name in ("batch_size", "workers", "shard_characters", "streams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"data.{name} is {value}; it must be at least 1."
        if self.shuffle_buffer < 0:
            yield (
                f"data.shuffle_buffer is {self.shuffle_buffer}; it must be a number of rows, or 0 to leave rows in the "
                "order of their documents."
            )
        if not (self.skip_invalid >= 0 and (self.skip_invalid <= 1 or self.skip_invalid % 1 == 0)):
            yield (
                f"data.skip_invalid is {self.skip_invalid}; it must be a whole number of records, or a fraction of "
                "them below 1."
            )
        if self.streams > 0 and self.batch_size % self.streams:
            yield (
                f"data.streams is {self.streams}, which does not divide data.batch_size ({self.batch_size}), as each "
                "stream gives as many rows."
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple, whichever way it was written."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's file.

    Attributes:
        path: a SentencePiece model file, such as Gemma's own tokenizer.model.
        vocab_size: if there is no file at `path` yet, one of this size is trained on the training documents, or of
            the largest size that they support; None only loads.
    """

    path: str
    vocab_size: int | None

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        if not self.path:
            yield "tokenizer.path is empty; it must name a SentencePiece model file."
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            yield (
                f"tokenizer.vocab_size is {self.vocab_size}; it must be at least {SMALLEST_VOCABULARY} "
                "(256 bytes, special tokens, and a character), or null to load only."
            )
