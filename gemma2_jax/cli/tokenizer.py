"""`gemma2 tokenizer`: trains, inspects and uses the tokenizer of a configuration."""

import argparse
import re
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import Verbs, add_actions, add_config_dir, add_overrides, add_verb
from gemma2_jax.cli.standard_streams import as_utf8, read_standard_input

if TYPE_CHECKING:
    from gemma2_jax.data.tokenizer import Tokenizer

DESCRIPTION = """\
Manages the tokenizer of a configuration (tokenizer.path): a SentencePiece model file, either Gemma's own or one
trained here with Gemma's settings.

  gemma2 tokenizer train                       trains tokenizer.path on data.source, if it does not exist yet
  gemma2 tokenizer show                        its file, size and control tokens
  gemma2 tokenizer encode "def add(a, b):"     one line per token: id and piece
  gemma2 tokenizer decode 417 89               the text of token ids
"""
TRAIN = """\
Trains a tokenizer of tokenizer.vocab_size pieces on the training documents of data.source, writes it to
tokenizer.path, and tokenises the source with it into data.folder. Does nothing if both exist.

  gemma2 tokenizer train
  gemma2 tokenizer train data=files data.source='my/*.txt' data.folder=data/my tokenizer.vocab_size=8192
"""
SHOW = """\
Prints the tokenizer's file, size, fingerprint and control tokens.

  gemma2 tokenizer show
  gemma2 tokenizer show tokenizer.path=my.model
"""
ENCODE = """\
Prints the tokens of a text, one per line: id and piece. In a piece, ▁ is a space and <0xC3> a single byte.

  gemma2 tokenizer encode "def add(a, b):"
  gemma2 tokenizer encode - < file.txt
"""
DECODE = """\
Prints the text of token ids.

  gemma2 tokenizer decode 417 89
  gemma2 tokenizer decode "[417, 89]" tokenizer.path=my.model
  gemma2 tokenizer encode "hello" | cut -f 1 | gemma2 tokenizer decode -
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "tokenizer", "train, inspect and use a tokenizer", DESCRIPTION)
    add_overrides(
        add_verb(
            actions, "train", train, "train the tokenizer, if it does not exist yet", TRAIN, resumes=True
        )
    )
    add_overrides(
        add_verb(actions, "show", show, "print the tokenizer's file, size and control tokens", SHOW)
    )
    parser = add_verb(actions, "encode", encode, "print the tokens of a text", ENCODE)
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from the standard input")
    add_overrides(parser)
    parser = add_verb(actions, "decode", decode, "print the text of token ids", DECODE)
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="ID",
        help="a token id, or key=value; - reads ids from the standard input",
    )
    add_config_dir(parser)


def train(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.data.prepare import prepare

    config = compose(arguments.overrides, arguments.config_dir)
    manifest = prepare(config.data, config.tokenizer)
    print(
        f"{config.tokenizer.path} has {manifest.vocab_size} tokens; {config.data.folder} is prepared with it."
    )


def show(arguments: argparse.Namespace) -> None:
    tokenizer, path = _load(arguments)
    print(
        f"file          {path}\ntokens        {tokenizer.vocab_size}\nfingerprint   {tokenizer.fingerprint}"
    )
    for name in ("pad", "bos", "eos", "end_of_turn"):
        print(f"{name:<13} {getattr(tokenizer, f'{name}_id')}")


def encode(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError

    for text in arguments.overrides:
        if "=" not in text:
            raise UserError(
                f'{text!r} is a second argument; put a text with blanks in quotes, as in "def add(a, b):".'
            )
    tokenizer, _ = _load(arguments)
    for token in tokenizer.encode(_argument(arguments.text)):
        print(f"{token}\t{tokenizer.piece(token)!r}")


def decode(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError

    given = arguments.overrides
    arguments.overrides = [text for text in given if "=" in text]
    text = " ".join(_argument(text) for text in given if "=" not in text)
    words = [word for word in re.split(r"[\s,\[\]]+", text) if word]
    for word in words:
        if not re.fullmatch("[0-9]+", word):
            raise UserError(f"{word!r} is not a token id; accepted: whole numbers, as in 417 89.")
    if not words:
        raise UserError(
            "there is no token id to decode; accepted: whole numbers, as in 417 89, or - for the standard input."
        )
    tokenizer, _ = _load(arguments)
    print(tokenizer.decode(int(word) for word in words))


def _load(arguments: argparse.Namespace) -> "tuple[Tokenizer, str]":
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.data.tokenizer import Tokenizer

    path = compose(arguments.overrides, arguments.config_dir).tokenizer.path
    return Tokenizer.load(path), path


def _argument(text: str) -> str:
    return read_standard_input() if text == "-" else as_utf8(text)
