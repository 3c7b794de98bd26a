"""SentencePiece as Gemma 2 uses it: load a model file, or train one with Gemma's settings.

The settings: BPE, split digits, preserved whitespace (no dummy prefix, nothing removed, no normalisation), byte
fallback, pad 0, eos 1, bos 2, unk 3, and user-defined pieces for `<start_of_turn>`, `<end_of_turn>`, and runs of
newlines and of spaces. A tokenizer trained here differs from Gemma's own in two ways, both of which save space in a
small vocabulary: the two turn tokens have ids 4 and 5 (Gemma: 106 and 107, after a hundred unused ids), and the runs
have at most 4 newlines or 16 spaces (Gemma: 31 of each; it also has pieces for HTML tags).
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from gemma2_jax.config import UserError
from gemma2_jax.files import reason, write_bytes

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
_TURNS = (START_OF_TURN, END_OF_TURN)

_SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_NEWLINES = ["\n" * length for length in range(1, 5)]
_SPACES = [_SPACE * length for length in range(2, 17)]
# Strings that SentencePiece would not encode as ordinary text; they are encoded separately.
_SPECIAL = re.compile(f"({START_OF_TURN}|{END_OF_TURN}|{_SPACE})")


class VocabularyTooLargeError(UserError):
    """The text supports no vocabulary of the requested size; `largest` is the largest that it supports."""

    def __init__(self, requested: int, largest: int) -> None:
        super().__init__(f"tokenizer.vocab_size is {requested}, but this text supports at most {largest}.")
        self.largest = largest


class Tokenizer:
    """Converts text to token ids and back. `decode(encode(text)) == text` for every text that UTF-8 can encode.

    (This holds for model files with Gemma's settings, not for those that normalise text or add a dummy prefix.)

    Attributes:
        fingerprint: sha256 of the model file, in hexadecimal.
    """

    def __init__(self, model: bytes, name: str, stop_ids: Iterable[int] | None = None) -> None:
        """Args: `model`: content of a SentencePiece model file; `name`: its name in error messages; `stop_ids`: stop
        ids of the checkpoint that it belongs to, by default the end-of-text and end-of-turn ids."""
        try:
            self._pieces = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{name} is not a SentencePiece model file.") from None
        for piece in ("bos", "eos"):
            if not model or getattr(self._pieces, f"{piece}_id")() < 0:
                raise UserError(
                    f"{name} has no {piece} token; accepted: a SentencePiece model with bos and eos."
                )
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._name = name
        space = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._special = {
            START_OF_TURN: self._find(START_OF_TURN),
            END_OF_TURN: self._find(END_OF_TURN),
            _SPACE: None if self._pieces.unk_id() in space else space,
        }
        self._stop_ids = None if stop_ids is None else frozenset(stop_ids)

    @classmethod
    def load(cls, path: str | os.PathLike[str], stop_ids: Iterable[int] | None = None) -> "Tokenizer":
        """Reads a SentencePiece model file. Raises UserError if it is missing or not a SentencePiece model."""
        try:
            return cls(Path(path).read_bytes(), str(path), stop_ids)
        except OSError as error:
            raise UserError(f"The tokenizer {path} cannot be read: {reason(error, path)}.") from None

    @property
    def vocab_size(self) -> int:
        """V, the number of ids. A model's embedding may have more rows than that, never fewer."""
        return int(self._pieces.vocab_size())

    @property
    def bos_id(self) -> int:
        """Id that begins every document."""
        return int(self._pieces.bos_id())

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""
        return int(self._pieces.eos_id())

    @property
    def pad_id(self) -> int:
        """Id that fills positions without text; the end-of-text id in files without a padding token."""
        pad = int(self._pieces.pad_id())
        return pad if pad >= 0 else self.eos_id

    @property
    def end_of_turn_id(self) -> int:
        """Id that ends a turn of a chat; the end-of-text id in files without turn tokens."""
        return (self._special[END_OF_TURN] or [self.eos_id])[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generated text."""
        return frozenset((self.eos_id, self.end_of_turn_id)) if self._stop_ids is None else self._stop_ids

    def encode(self, text: str, bos: bool = False, eos: bool = False, control: bool = False) -> list[int]:
        """Returns the token ids of `text`.

        Args:
            bos: whether to put the beginning-of-text id in front.
            eos: whether to append the end-of-text id.
            control: whether `<start_of_turn>` and `<end_of_turn>` in the text become the control tokens, as chats
                need. Otherwise they are encoded as ordinary text, so that a document about chat formats ends no
                turn. (SentencePiece alone would always produce the tokens, since they are user-defined pieces.)

        Raises:
            UserError: the text contains a lone surrogate, which UTF-8 cannot encode; or `control` is set, the text
                contains a turn token, and the file has none.
        """
        ids: list[int] = [self.bos_id] if bos else []
        try:
            for part in _SPECIAL.split(text):
                ids += self._encode_part(part, control)
        except UnicodeEncodeError:
            raise UserError("A text contains a lone surrogate, which UTF-8 cannot encode.") from None
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids. Leaves out pad, bos and eos; writes turn tokens as `<start_of_turn>` etc.

        Bytes that are not valid UTF-8 (a text cut within a character) become U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        return str(self._pieces.decode([self._checked(number) for number in ids]))

    def piece(self, number: int) -> str:
        """Returns a token id's piece as it is written in the file: `▁` for a space, `<0xC3>` for a byte.

        Raises:
            UserError: the id is not in the vocabulary.
        """
        return str(self._pieces.id_to_piece(self._checked(number)))

    def control_id(self, text: str) -> int | None:
        """Returns the id of the control token with this name, such as `<eos>`, which decodes to no text; else None."""
        number = int(self._pieces.piece_to_id(text))
        return number if self._pieces.is_control(number) else None

    def byte_lengths(self) -> list[int]:
        """Returns the number of UTF-8 bytes of text that each id stands for; 0 for control and turn tokens.

        The lengths of a text's ids add up to its length, for model files with Gemma's settings.
        """
        return [self._byte_length(number) for number in range(self.vocab_size)]

    def _byte_length(self, number: int) -> int:
        pieces = self._pieces
        if pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_unused(number):
            return 0
        if pieces.is_byte(number):
            return 1
        piece = str(pieces.id_to_piece(number))
        return 0 if piece in _TURNS else len(piece.replace(_SPACE, " ").encode())

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.vocab_size:
            raise UserError(
                f"Token id {number} is not in {self._name}, which has ids 0 to {self.vocab_size - 1}."
            )
        return int(number)

    def _find(self, piece: str) -> list[int] | None:
        number = self._pieces.piece_to_id(piece)
        return None if number == self._pieces.unk_id() else [number]

    def _encode_part(self, part: str, control: bool) -> list[int]:
        if part == _SPACE:
            # As a piece it would be decoded to a space; as bytes it is decoded to itself.
            return self._special[_SPACE] or self._encode_plain(part)
        if part not in self._special:
            return self._encode_plain(part)
        if not control:
            return self._encode_plain(part[:1]) + self._encode_plain(part[1:])
        found = self._special[part]
        if found is None:
            raise UserError(
                f"{self._name} has no {part} token; a chat needs Gemma's tokenizer or one trained here."
            )
        return found

    def _encode_plain(self, text: str) -> list[int]:
        # As bytes, since SentencePiece's own error for a string that it cannot encode does not help.
        return list(self._pieces.encode(text.encode())) if text else []


def train_tokenizer(documents: Iterable[str], path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer with Gemma's settings (see the top of this file) and writes it to `path`.

    The same documents in the same order give the same file. SentencePiece holds all documents in memory.

    Raises:
        VocabularyTooLargeError: the documents contain too little text for `vocab_size`.
        UserError: the documents contain too many different characters.
    """
    buffer = io.BytesIO()
    # Newlines are separate pieces, so no other piece crosses one: lines give the same result as whole documents, and
    # stay within SentencePiece's limit on the length of a sentence.
    lines = _Lines(documents)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            user_defined_symbols=[START_OF_TURN, END_OF_TURN, *_NEWLINES, *_SPACES],
            max_sentence_length=2**30,
            num_threads=8,  # fixed, since it is written into the file and must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise _training_failure(str(error), vocab_size) from None
    write_bytes(path, buffer.getvalue())
    return Tokenizer(buffer.getvalue(), str(path))


class _Lines:
    """Iterates over the lines of documents for SentencePiece's C++, which turns any exception into a RuntimeError.

    Attributes:
        failure: the original exception: bad input, or a signal that ends the process.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._documents:
                yield from filter(None, document.split("\n"))
        except BaseException as error:
            self.failure = error
            raise


def _training_failure(message: str, vocab_size: int) -> UserError:
    if largest := re.search(r"a value <= (\d+)", message):
        return VocabularyTooLargeError(vocab_size, int(largest[1]))
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(f"tokenizer.vocab_size is {vocab_size}; this text needs at least {smallest[1]}.")
    if "all_chars_count" in message:
        return UserError("No tokenizer can be trained on this text: it contains no characters except NUL.")
    reason = re.sub(r"^INTERNAL: |\S+\.(cc|h)\(\d+\) |\[.*?\] ?", "", message).strip(" .")
    return UserError(f"No tokenizer of {vocab_size} tokens can be trained on this text: {reason}.")
