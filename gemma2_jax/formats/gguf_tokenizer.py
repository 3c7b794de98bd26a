"""The tokenizer in a GGUF file: pieces, scores and types of SentencePiece, as llama.cpp expects them.

llama.cpp ignores some of a SentencePiece model's content and changes some types and scores. So our files also hold the
model file itself, under a key of our own, which other programs ignore; a tokenizer read back from them is the same byte
for byte. From other files the model is rebuilt: it encodes alike, but has another fingerprint.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import sentencepiece_model_pb2

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import reason
from gemma2_jax.formats.gguf_header import is_gguf, open_reader, package, read_list, read_values
from gemma2_jax.formats.metadata import Metadata, templates_json
from gemma2_jax.formats.tokenizer_files import parse_model
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.vocabulary import check_tokens

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MODEL = "gemma2_jax.tokenizer_model"  # SentencePiece's file in base64: readers handle a long list slowly
_KEYS = "tokenizer.ggml."
_BPE = "llama"  # llama.cpp's name for SentencePiece's BPE
# User-defined pieces of the model file that llama.cpp treats as control tokens, not as text.
_CONTROL_PIECE = re.compile(r"<(?:start|end)_of_turn>|<unused\d+>|<mask>|<2mass>|\[@BOS@\]")
_NEVER_MERGED = -1000.0  # score of pieces that are only matched as a whole, never merged from smaller ones
_MESSAGES: Any = sentencepiece_model_pb2  # as Any, since its classes exist only once it is imported


def add_tokenizer(
    gguf: Any, writer: "GGUFWriter", config: ModelConfig, model: bytes, metadata: Metadata
) -> None:
    """Adds a tokenizer's metadata to a file.

    Args:
        gguf: the package.
        model: content of the SentencePiece model file.

    Raises:
        UserError: GGUF cannot express the tokenizer, or the model has another number of tokens.
    """
    tokenizer = Tokenizer(model, "The tokenizer", metadata.stop_ids)
    check_tokens(config, tokenizer.vocab_size, "The tokenizer")
    tokens, scores, types = _vocabulary(gguf.TokenType, model)
    writer.add_tokenizer_model(_BPE)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id)
    ends = _ends(tokenizer)
    writer.add_eos_token_id(ends[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_unk_token_id(types.index(gguf.TokenType.UNKNOWN))
    writer.add_add_bos_token(bool(metadata.tokenizer.get("add_bos_token", True)))
    writer.add_add_eos_token(bool(metadata.tokenizer.get("add_eos_token", False)))
    writer.add_add_space_prefix(False)
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), ends[1:], strict=False):
        add(number)
    if metadata.chat_template is not None:
        writer.add_chat_template(templates_json(metadata.chat_template))
    elif tokenizer.end_of_turn_id != tokenizer.eos_id:
        writer.add_chat_template(chat_template())
    writer.add_string(_MODEL, base64.b64encode(model).decode())


def read_model(path: str | Path) -> bytes:
    """Returns the content of the SentencePiece model file at `path`, or of the one in the GGUF file at `path`.

    Raises:
        UserError: the file cannot be read, or is a GGUF file whose tokenizer is missing, damaged or of another kind.
    """
    if not is_gguf(path):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"The tokenizer {path} cannot be read: {reason(error, path)}.") from None
    gguf, reader = package(), open_reader(path)
    values = read_values(reader)
    if _MODEL in values:
        try:
            return base64.b64decode(values[_MODEL], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise UserError(f"{path} has a damaged {_MODEL}; convert the original again.") from None
    if values.get(f"{_KEYS}model") != _BPE:
        raise UserError(
            f"{path} has the tokenizer {values.get(f'{_KEYS}model')}; accepted: {_BPE}, which is SentencePiece's. Give "
            "the model's SentencePiece file as --tokenizer FILE."
        )
    lists = {key: read_list(reader, f"{_KEYS}{key}") for key in ("tokens", "scores", "token_type")}
    for key, found in lists.items():
        if found is None or len(found) != len(lists["tokens"] or ()):
            raise UserError(
                f"{path} has no complete list {_KEYS}{key}; give the model's SentencePiece file as --tokenizer FILE."
            )
    return _rebuilt(gguf.TokenType, values, *lists.values())


def _rebuilt(kinds: Any, values: dict[str, Any], tokens: Any, scores: Any, types: Any) -> bytes:
    """Returns a SentencePiece model file with these pieces and Gemma's settings; undoes `_vocabulary`."""
    proto = _MESSAGES.ModelProto()
    for token, score, number in zip(tokens, scores, types, strict=True):
        kind = kinds(number)
        if kind == kinds.CONTROL and _CONTROL_PIECE.fullmatch(token):
            kind = kinds.USER_DEFINED
        is_whole = kind in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN)
        text = token.replace(" ", "▁") if kind == kinds.USER_DEFINED else token
        proto.pieces.add(piece=text, score=0.0 if is_whole else float(score), type=int(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = _MESSAGES.TrainerSpec.BPE
    trainer.byte_fallback = True
    trainer.vocab_size = len(tokens)
    ids = {"pad": "padding", "eos": "eos", "bos": "bos", "unk": "unknown"}
    for name, key in ids.items():
        number = values.get(f"{_KEYS}{key}_token_id", -1)
        setattr(trainer, f"{name}_id", number)
        if 0 <= number < len(tokens):
            setattr(trainer, f"{name}_piece", tokens[number])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(values.get(f"{_KEYS}add_space_prefix", False))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    content: bytes = proto.SerializeToString()
    return content


def gguf_metadata(path: str | Path, values: dict[str, Any], architecture: str) -> Metadata:
    """Returns the metadata of a GGUF file, given its keys and values."""
    ends = [values.get(f"{_KEYS}{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = sorted({number for number in ends if number is not None})
    context = values.get(f"{architecture}.context_length")
    tokenizer = {key: values.get(f"{_KEYS}{key}") for key in ("add_bos_token", "add_eos_token")}
    return Metadata(
        model={} if context is None else {"max_position_embeddings": context},
        generation={"eos_token_id": stops} if stops else {},
        tokenizer={key: value for key, value in tokenizer.items() if value is not None},
        chat_template=values.get("tokenizer.chat_template"),
    )


def _ends(tokenizer: Tokenizer) -> list[int]:
    """Returns the stop ids, starting with the tokenizer's end of text and end of turn.

    llama.cpp has keys for three: the ends of a text, of a turn and of a message. It stops at all of them, and always
    at `<end_of_turn>`, which it recognises by name.

    Raises:
        UserError: there are more than three.
    """
    usual = [tokenizer.eos_id, tokenizer.end_of_turn_id]
    stop = [number for number in tokenizer.stop_ids if number < tokenizer.vocab_size] or usual[:1]
    ends = sorted(stop, key=lambda number: (usual.index(number) if number in usual else len(usual), number))
    if tokenizer.end_of_turn_id not in (tokenizer.eos_id, *ends):
        ends.insert(1, tokenizer.end_of_turn_id)
    if len(ends) > 3:
        raise UserError(
            f"The stop ids are {', '.join(map(str, ends))}, but GGUF can store only 3; remove some from eos_token_id "
            "in the source's generation_config.json (metadata.json in a run folder)."
        )
    return ends


def _vocabulary(kinds: Any, model: bytes) -> tuple[list[str], list[float], list[int]]:
    """Returns the text, score and type of every piece, like llama.cpp's own converter.

    Raises:
        UserError: the tokenizer has a setting that llama.cpp does not support, so that it would encode differently.
    """
    proto = parse_model(model, "llama.cpp")
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        text, score, kind = piece.piece, piece.score, kinds(piece.type)  # the numbers are SentencePiece's
        if kind == kinds.USER_DEFINED and _CONTROL_PIECE.fullmatch(text):
            kind = kinds.CONTROL
        if kind == kinds.USER_DEFINED:
            text = text.replace("▁", " ")  # llama.cpp matches these pieces before it replaces spaces
        if kind in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN):
            score = _NEVER_MERGED
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    return tokens, scores, types
