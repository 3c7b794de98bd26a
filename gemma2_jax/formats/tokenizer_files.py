"""Writes the files with which transformers' `AutoTokenizer` gives the same ids as `Tokenizer`.

tokenizer.model and tokenizer_config.json are enough: from them `GemmaTokenizer` builds its own BPE, whose merges have
SentencePiece's ranks. Two settings in the config differ from transformers' defaults. User-defined pieces are matched,
longest first, after spaces have become `▁` ("normalized"); otherwise a run of spaces longer than the longest piece
would be split differently. And `<mask>`, which the class appends to vocabularies without it, is switched off.

Remaining differences of transformers 5, which no file can change:

- `<bos>`, `<eos>`, `<pad>`, `<unk>` and the turn tokens in a text always become the tokens. `Tokenizer.encode`
  treats the first four as text, and the turn tokens too unless `control` is set.
- `▁` (U+2581) in a text becomes a space, as in SentencePiece itself; `Tokenizer.encode` encodes it as bytes.
- A lone surrogate raises a TypeError (a UserError in `Tokenizer`).
- `decode` writes `<bos>`, `<eos>`, `<pad>` and `<unk>` as text, and turns a run of byte pieces into U+FFFD byte by byte
  if the run is not valid UTF-8. `Tokenizer.decode` omits the first three, gives ` ⁇ ` for `<unk>`, and keeps the valid
  characters of such a run. With `skip_special_tokens=True`, transformers omits the turn tokens too.

transformers reads tokenizer.model with the packages sentencepiece and protobuf; for programs that read only
tokenizer.json, its `save_pretrained` writes one.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from gemma2_jax.files import write_bytes, write_text
from gemma2_jax.formats.metadata import TOKENIZER_CONFIG_FILE, Metadata, templates_json
from gemma2_jax.formats.source import TOKENIZER_FILE

_MESSAGES: Any = sentencepiece_model_pb2  # as Any, since its classes exist only once it is imported


def write_tokenizer_files(folder: str | Path, model: bytes, metadata: Metadata = Metadata()) -> None:
    """Writes tokenizer.model and tokenizer_config.json, with a chat template if the tokenizer has turn tokens.

    Args:
        folder: target folder, created if it does not exist.
        model: content of a SentencePiece model file.
        metadata: metadata of the tokenizer's model.

    Raises:
        UserError: the tokenizer has a setting that `GemmaTokenizer` does not support, so that it would encode
            differently; nothing is written.
    """
    values = {**tokenizer_config(model), **metadata.tokenizer}
    if metadata.chat_template is not None:
        values["chat_template"] = templates_json(metadata.chat_template)
    config = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_bytes(Path(folder) / TOKENIZER_FILE, model)
    write_text(Path(folder) / TOKENIZER_CONFIG_FILE, config)


def tokenizer_config(model: bytes) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json. Raises UserError as `write_tokenizer_files` does."""
    tokenizer = Tokenizer(model, "The tokenizer")
    proto = parse_model(model, "transformers' GemmaTokenizer")
    kinds = type(proto).SentencePiece
    whole_pieces = {  # those that are found in a text before anything is merged
        number: piece
        for number, piece in enumerate(proto.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    }
    turns = [piece.piece for piece in whole_pieces.values() if piece.piece in (START_OF_TURN, END_OF_TURN)]
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "unk_token": next(piece.piece for piece in whole_pieces.values() if piece.type == kinds.UNKNOWN),
        "mask_token": None,
        "additional_special_tokens": turns,
        "added_tokens_decoder": {
            str(number): _added(piece.piece, piece.type != kinds.USER_DEFINED or piece.piece in turns)
            for number, piece in whole_pieces.items()
        },
        "clean_up_tokenization_spaces": False,
    }
    if len(turns) == 2:
        config["chat_template"] = chat_template()
    return config


def parse_model(model: bytes, reader: str) -> Any:
    """Returns a SentencePiece model file's ModelProto.

    It gives the user-defined pieces and the settings, which `SentencePieceProcessor` does not.

    Args:
        model: content of the file.
        reader: name of the program that will read the tokenizer, for error messages.

    Raises:
        UserError: the settings are not Gemma's, the only ones that the other programs support.
    """
    proto = _MESSAGES.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    settings = {
        "model_type is BPE": trainer.model_type == _MESSAGES.TrainerSpec.BPE,
        "byte_fallback is true": trainer.byte_fallback,
        "treat_whitespace_as_suffix is false": not trainer.treat_whitespace_as_suffix,
        "add_dummy_prefix is false": not normalizer.add_dummy_prefix,
        "remove_extra_whitespaces is false": not normalizer.remove_extra_whitespaces,
        "escape_whitespaces is true": normalizer.escape_whitespaces,
        "text is not normalised": not normalizer.precompiled_charsmap,
    }
    for setting, is_met in settings.items():
        if not is_met:
            raise UserError(f"The tokenizer cannot be expressed for {reader}; accepted: one whose {setting}.")
    return proto


def _added(text: str, special: bool) -> dict[str, str | bool]:
    # Special tokens are matched in the original text, the others after spaces are replaced.
    flags = dict(lstrip=False, normalized=not special, rstrip=False, single_word=False, special=special)
    return {"content": text, **flags}
