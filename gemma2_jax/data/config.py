"""Configuration of the training data (`DataConfig`, `ConversationsConfig`) and its tokenizer (`TokenizerConfig`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma2_jax.config import refuse

PYTHON_DOCS = "python-docs"
SMALLEST_VOCABULARY = 282  # of a tokenizer to train: 256 bytes, 25 fixed pieces, and one character


@dataclass(frozen=True)
class ConversationsConfig:
    """How a conversation becomes tokens and a loss mask. Stored with the prepared data, which depends on it.

    Attributes:
        system: what to do with a system turn, which Gemma 2's chat format lacks: "refuse" treats its conversation as
            unreadable, "fold" puts its text and a blank line before the first user turn.
        loss_on: which of the model's turns carry loss: "all" or only the "last".
        newline: whether the newline after a turn's <end_of_turn> carries loss too. TRL trains on it, DeepMind's gemma
            does not; the model never has to generate it, since a turn is complete without it.
    """

    system: Literal["refuse", "fold"] = "refuse"
    loss_on: Literal["all", "last"] = "all"
    newline: bool = False


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        source: as `data.source`.
        weight: its share of the rows, relative to the other sources' weights.
        kind: whether it holds "text" or "conversations".
    """

    source: str | tuple[str, ...]
    weight: float
    kind: Literal["text", "conversations"] = "text"


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, how it is stored, and how it becomes batches.

    Attributes:
        source: "python-docs" (the documentation in Python's own standard library), or one or several globs
            of .txt, .md, .rst, .jsonl or .parquet files, each optionally .gz or .zst. Each line of JSONL and each
            row of Parquet is a document. Text files are cut at blank lines into documents of 4,000 characters or a
            little more; a shorter file is one document.
        folder: folder of the tokenised shards and their manifest; several runs may share it.
        validation_fraction: fraction of the documents to hold out, in [0, 1); a hash of its content assigns each
            document to a split. Above 0, both splits get at least one document; a single document is cut into pieces
            for this.
        seq_len: T, tokens in a row of a batch.
        batch_size: B, rows in an optimizer step over all processes.
        seed: seed of the order of the documents and of the rows.
        text_field: the field of JSONL objects, or the column of Parquet files, that holds the text.
        workers: number of processes that tokenise; null for one per CPU.
        shard_characters: number of characters of text after which a shard is closed.
        streams: number of streams that the documents are divided among. Each stream fills its share of the rows of
            every batch, and a process reads only the streams of its own rows. With 1, each process reads everything.
        shuffle_buffer: number of rows to hold in memory and return in random order before reading the next as many,
            so that the rows of a long document are spread over many batches; at most the rows of one epoch. 0 keeps
            the rows of a document together, in order.
        skip_invalid: maximum number of unreadable records to skip or, below 1, their maximum fraction of all
            records; more raise an error. A record is a line of JSONL, a row of Parquet, a document of a text
            file, or a file that cannot be divided into records.
        conversations: settings of conversations, which the lines of JSONL and the rows of Parquet then hold; None for
            text.
        too_long: what to do with a conversation of more than seq_len + 1 tokens: "truncate" or "drop". Text has no
            such limit, since a document continues in the next row.
        packing_window: number of conversations that are packed into rows together; at most those of one epoch. A
            larger window leaves less padding.
        mixture: several sources in place of `source`, which must then be empty. Their rows alternate by weight, and
            each has epochs of its own.
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
    # Older runs lack these keys.
    conversations: ConversationsConfig | None = None
    too_long: Literal["truncate", "drop"] = "truncate"
    packing_window: int = 4096
    mixture: tuple[MixtureSource, ...] = ()

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        yield from self._about_mixture()
        if not self.mixture and not (self.sources and all(self.sources)):
            yield f"data.source is {self.source!r}; accepted: python-docs, or one or several globs of files."
        if not self.folder:
            yield "data.folder is empty; it must name the folder for the prepared data."
        if not 0 <= self.validation_fraction < 1:
            yield f"data.validation_fraction is {self.validation_fraction}; accepted: at least 0, below 1."
        if not 2 <= self.seq_len < 2**31:
            yield f"data.seq_len is {self.seq_len}; accepted: at least 2, below 2**31."
        if not 0 <= self.seed < 2**32:
            yield f"data.seed is {self.seed}; it must be at least 0 and below 2**32."
        if self.conversations is not None and self.sources == (PYTHON_DOCS,):
            yield (
                f"data.source is {PYTHON_DOCS}, which holds no conversations; set it to globs of .jsonl or .parquet "
                "files, or write data=python_docs for the text."
            )
        for name in ("batch_size", "workers", "shard_characters", "streams", "packing_window"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                yield f"data.{name} is {value}; accepted: at least 1, below 2**31."
        if self.shuffle_buffer < 0:
            yield (
                f"data.shuffle_buffer is {self.shuffle_buffer}; it must be a number of rows, or 0 to keep the rows in "
                "the order of their documents."
            )
        if not (self.skip_invalid >= 0 and (self.skip_invalid <= 1 or self.skip_invalid % 1 == 0)):
            yield (
                f"data.skip_invalid is {self.skip_invalid}; it must be a whole number of records, or a fraction below "
                "1 of all records."
            )
        if self.streams > 0 and self.batch_size % self.streams:
            yield (
                f"data.streams is {self.streams}; it must divide data.batch_size ({self.batch_size}), since every "
                "stream fills the same number of rows."
            )

    def _about_mixture(self) -> Iterator[str]:
        if self.mixture and self.source:
            yield f"data.source is {self.source!r} and data.mixture is set; data.source=[] leaves the mixture alone."
        for number, part in enumerate(self.mixture):
            if not part.source:
                yield f"data.mixture[{number}].source is {part.source!r}; it must be one or several globs of files."
            if not 0 < part.weight < float("inf"):
                yield f"data.mixture[{number}].weight is {part.weight}; it must be a number above 0."
            if part.kind == "conversations" and self.conversations is None:
                yield f"data.mixture[{number}].kind is conversations, but data.conversations is null; set its keys."

    @property
    def with_conversations(self) -> bool:
        """Whether the source, or at least one of the mixture's, holds conversations."""
        return "conversations" in self._kinds

    @property
    def with_text(self) -> bool:
        """Whether the source, or at least one of the mixture's, holds text."""
        return "text" in self._kinds

    @property
    def _kinds(self) -> list[str]:
        if self.mixture:
            return [part.kind for part in self.mixture]
        return ["text" if self.conversations is None else "conversations"]

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple, also if it is a single string."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's file.

    Attributes:
        path: a SentencePiece model file, such as Gemma's own tokenizer.model.
        vocab_size: number of tokens. If `path` does not exist yet, a tokenizer of this size, or of the largest size
            that the text supports, is trained on the training documents. With null, `path` must exist.
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
