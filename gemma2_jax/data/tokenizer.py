"""SentencePiece as Gemma 2 uses it: load a model file, or train one with Gemma's settings.

The settings: BPE, digits split, whitespace preserved (no dummy prefix, nothing removed, no normalisation),
byte fallback, pad 0, eos 1, bos 2, unk 3, and `<start_of_turn>`, `<end_of_turn>` and runs of newlines and of
spaces as user-defined pieces. A tokenizer trained here differs from Gemma's own in two ways, both to spend a
small vocabulary well: the two turn tokens have ids 4 and 5 (Gemma: 106 and 107, after a hundred unused ones),
and runs are kept up to 4 newlines and 16 spaces (Gemma: 31 of each; it also has pieces for HTML tags).
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

_SPACE = "▁"  # U+2581, how SentencePiece writes a space
_NEWLINES = ["\n" * length for length in range(1, 5)]
_SPACES = [_SPACE * length for length in range(2, 17)]
# Texts that SentencePiece would not take for what they are, and so are encoded by hand.
_SPECIAL = re.compile(f"({START_OF_TURN}|{END_OF_TURN}|{_SPACE})")


class VocabularyTooLargeError(UserError):
    """A tokenizer cannot be trained to as many tokens as asked for; `most` is what the text supports."""

    def __init__(self, asked: int, most: int) -> None:
        super().__init__(f"tokenizer.vocab_size is {asked}; these documents allow at most {most}.")
        self.most = most


class Tokenizer:
    """Text to token ids and back. `decode(encode(text)) == text` for every text that UTF-8 can express.

    (For files with Gemma's settings; one that normalises text or adds a dummy prefix does as it was made to.)

    Attributes:
        fingerprint: sha256 of the model file, in hexadecimal.
    """

    def __init__(self, model: bytes, name: str, stop_ids: Iterable[int] | None = None) -> None:
        """Args: `model`: content of a SentencePiece model file; `name`: what to call it in an error; `stop_ids`: those
        of the checkpoint that it belongs to, by default the ends of a text and of a turn."""
        try:
            self._pieces = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
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
        """Reads a SentencePiece model file. Raises UserError if there is none or it is something else."""
        try:
            return cls(Path(path).read_bytes(), str(path), stop_ids)
        except OSError as error:
            raise UserError(f"The tokenizer {path} cannot be read: {reason(error, path)}.") from None

    @property
    def vocab_size(self) -> int:
        """V, the number of ids. A model may have more rows than that, never fewer."""
        return int(self._pieces.vocab_size())

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        return int(self._pieces.bos_id())

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return int(self._pieces.eos_id())

    @property
    def pad_id(self) -> int:
        """Fills what is no text; the end-of-text id in files without a padding token."""
        pad = int(self._pieces.pad_id())
        return pad if pad >= 0 else self.eos_id

    @property
    def end_of_turn_id(self) -> int:
        """Ends a turn of a chat; the end-of-text id in files that know no turns."""
        return (self._special[END_OF_TURN] or [self.eos_id])[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Those that end a generated text."""
        return frozenset((self.eos_id, self.end_of_turn_id)) if self._stop_ids is None else self._stop_ids

    def encode(self, text: str, bos: bool = False, eos: bool = False, control: bool = False) -> list[int]:
        """Returns the token ids of `text`.

        Args:
            bos: put the beginning-of-text id in front.
            eos: put the end-of-text id behind.
            control: take `<start_of_turn>` and `<end_of_turn>` in the text for the control tokens, as a chat
                needs it. Otherwise they are spelt out as ordinary text, which SentencePiece by itself would not
                do (they are user-defined pieces): a document about chat formats must not end a turn.

        Raises:
            UserError: the text holds a lone surrogate, which UTF-8 cannot express; or `control` is asked of a
                file without turn tokens.
        """
        ids: list[int] = [self.bos_id] if bos else []
        try:
            for part in _SPECIAL.split(text):
                ids += self._encode_part(part, control)
        except UnicodeEncodeError:
            raise UserError("A text holds a lone surrogate, which UTF-8 cannot express.") from None
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; pad, bos and eos are no text, turn tokens are spelt out.

        Bytes that are no valid UTF-8 (a text cut within a character) become U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        return str(self._pieces.decode([self._known(number) for number in ids]))

    def piece(self, number: int) -> str:
        """Returns a token id's piece as the file has it: `▁` for a space, `<0xC3>` for a byte.

        Raises:
            UserError: the id is not in the vocabulary.
        """
        return str(self._pieces.id_to_piece(self._known(number)))

    def control_id(self, text: str) -> int | None:
        """The id of a control token such as `<eos>`, which has no text of its own when it is decoded, by its name."""
        number = int(self._pieces.piece_to_id(text))
        return number if self._pieces.is_control(number) else None

    def _known(self, number: int) -> int:
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
            # As a piece it would come back as a space; as bytes it comes back as itself.
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
        # Bytes, since SentencePiece's own words about a string that it cannot take are of no use.
        return list(self._pieces.encode(text.encode())) if text else []


def train_tokenizer(documents: Iterable[str], path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer with Gemma's settings (see the top of this file) and writes it to `path`.

    The same documents in the same order give the same file. The documents are held in memory, as
    SentencePiece needs them there.

    Raises:
        VocabularyTooLargeError: the documents hold too little text for `vocab_size`.
        UserError: they hold too many different characters.
    """
    buffer = io.BytesIO()
    # Newlines are pieces of their own, so no other piece crosses one: feeding lines gives what feeding whole
    # documents would, and keeps within SentencePiece's limits on a sentence.
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
            num_threads=8,  # is written into the file: the machine must not decide
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise _training_failure(str(error), vocab_size) from None
    write_bytes(path, buffer.getvalue())
    return Tokenizer(buffer.getvalue(), str(path))


class _Lines:
    """The lines of documents, to be read from C++, which makes a RuntimeError of any exception.

    Attributes:
        failure: that exception: bad input, or a signal that ends the process.
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
    if most := re.search(r"a value <= (\d+)", message):
        return VocabularyTooLargeError(vocab_size, int(most[1]))
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(f"tokenizer.vocab_size is {vocab_size}; these documents need at least {least[1]}.")
    if "all_chars_count" in message:
        return UserError("No tokenizer can be trained on these documents: they hold no characters but NUL.")
    reason = re.sub(r"^INTERNAL: |\S+\.(cc|h)\(\d+\) |\[.*?\] ?", "", message).strip(" .")
    return UserError(f"No tokenizer of {vocab_size} tokens can be trained on these documents: {reason}.")
