"""What transformers' `AutoTokenizer` needs beside the weights to give the ids that `Tokenizer` gives.

tokenizer.model and tokenizer_config.json are enough: from them `GemmaTokenizer` builds its own BPE, whose merges
are ranked as SentencePiece ranks them. Two things in the config are not as transformers would have them by
itself. A run of spaces longer than the longest piece for one would be cut up in another way, so user-defined
pieces are looked for in the text in which spaces are `▁` already ("normalized"), by the longest one first. And
`<mask>`, which the class adds behind the last id where the vocabulary has none, is switched off.

What stays different (in transformers 5; none of it is a matter of files):

- `<bos>`, `<eos>`, `<pad>`, `<unk>` and the turn tokens in a text always become the tokens. `Tokenizer.encode`
  takes the first four for text, and the turn tokens too unless `control` is set.
- `▁` (U+2581) in a text becomes a space, as in SentencePiece itself; `Tokenizer.encode` spells it as bytes.
- A lone surrogate, which both refuse, is a TypeError there.
- `decode` spells out `<bos>`, `<eos>`, `<pad>` and `<unk>`, and a run of byte pieces that is no valid UTF-8 as a
  whole becomes U+FFFD byte by byte; `Tokenizer.decode` leaves the first three out, gives ` ⁇ ` for `<unk>`, and
  keeps the valid characters of such a run. With `skip_special_tokens=True` the turn tokens are gone there too.

transformers reads tokenizer.model through the packages sentencepiece and protobuf; for programs that read only
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

_MESSAGES: Any = sentencepiece_model_pb2  # whose classes are made when it is imported


def write_tokenizer_files(folder: str | Path, model: bytes, metadata: Metadata = Metadata()) -> None:
    """Writes tokenizer.model and tokenizer_config.json, with a chat template where the tokenizer knows turns.

    Args:
        folder: made if it does not exist.
        model: content of a SentencePiece model file.
        metadata: of the model that the tokenizer belongs to.

    Raises:
        UserError: the tokenizer has a setting that `GemmaTokenizer` does not know, so that it would encode
            differently. Nothing is written.
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
    wholes = {  # what is found in a text before anything is merged
        number: piece
        for number, piece in enumerate(proto.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    }
    turns = [piece.piece for piece in wholes.values() if piece.piece in (START_OF_TURN, END_OF_TURN)]
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "unk_token": next(piece.piece for piece in wholes.values() if piece.type == kinds.UNKNOWN),
        "mask_token": None,
        "additional_special_tokens": turns,
        "added_tokens_decoder": {
            str(number): _added(piece.piece, piece.type != kinds.USER_DEFINED or piece.piece in turns)
            for number, piece in wholes.items()
        },
        "clean_up_tokenization_spaces": False,
    }
    if len(turns) == 2:
        config["chat_template"] = chat_template()
    return config


def parse_model(model: bytes, reader: str) -> Any:
    """Returns a SentencePiece model file's ModelProto.

    `SentencePieceProcessor` tells neither which pieces are user-defined nor the settings.

    Args:
        model: content of the file.
        reader: which other program is to read it, for the error.

    Raises:
        UserError: the settings are not Gemma's, which are all that the other programs know.
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
    for setting, held in settings.items():
        if not held:
            raise UserError(f"The tokenizer cannot be expressed for {reader}; accepted: one whose {setting}.")
    return proto


def _added(text: str, special: bool) -> dict[str, str | bool]:
    # Special ones are looked for in the text as it came, the others once spaces are replaced.
    flags = dict(lstrip=False, normalized=not special, rstrip=False, single_word=False, special=special)
    return {"content": text, **flags}
