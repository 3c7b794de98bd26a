"""`gemma2 tokenizer`: train, inspect and use the tokenizer of a configuration."""

import argparse
import sys
from typing import TYPE_CHECKING

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.data.tokenizer import Tokenizer

DESCRIPTION = """\
Works with the tokenizer that a configuration names (tokenizer.path): a SentencePiece model file, Gemma's own or
one trained here with its settings.

  gemma2 tokenizer train                       trains tokenizer.path on data.source, if it does not exist yet
  gemma2 tokenizer show                        its file, size and control tokens
  gemma2 tokenizer encode "def add(a, b):"     one line a token: id and piece
  gemma2 tokenizer decode "417 89"             the text of token ids
"""
TRAIN = """\
Trains a tokenizer of tokenizer.vocab_size pieces on the training documents of data.source, writes it to
tokenizer.path, and tokenises the source with it into data.folder. Does nothing if all of that is there.

  gemma2 tokenizer train
  gemma2 tokenizer train data=files data.source='my/*.txt' data.folder=data/my tokenizer.vocab_size=8192
"""
SHOW = """\
Prints the tokenizer's file, size, fingerprint and control tokens.

  gemma2 tokenizer show
  gemma2 tokenizer show tokenizer.path=my.model
"""
ENCODE = """\
Prints the tokens of a text, one a line: id and piece, in which ▁ is a space and <0xC3> a single byte.

  gemma2 tokenizer encode "def add(a, b):"
  gemma2 tokenizer encode - < file.txt
"""
DECODE = """\
Prints the text of token ids.

  gemma2 tokenizer decode "417 89"
  gemma2 tokenizer encode "hello" | cut -f 1 | gemma2 tokenizer decode -
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "tokenizer", "train, inspect and use a tokenizer", DESCRIPTION)
    add_overrides(
        add_verb(actions, "train", train, "train it, if it does not exist yet", TRAIN, resumes=True)
    )
    add_overrides(add_verb(actions, "show", show, "print its file, size and control tokens", SHOW))
    parser = add_verb(actions, "encode", encode, "print the tokens of a text", ENCODE)
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from the standard input")
    add_overrides(parser)
    parser = add_verb(actions, "decode", decode, "print the text of token ids", DECODE)
    parser.add_argument(
        "ids", metavar="IDS", help="ids with blanks between; - reads them from the standard input"
    )
    add_overrides(parser)


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
    tokenizer, _ = _load(arguments)
    for token in tokenizer.encode(_argument(arguments.text)):
        print(f"{token}\t{tokenizer.piece(token)!r}")


def decode(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError

    tokenizer, _ = _load(arguments)
    words = _argument(arguments.ids).split()
    for word in words:
        if not word.isdecimal():
            raise UserError(f"{word!r} is not a token id; accepted: whole numbers with blanks between.")
    print(tokenizer.decode(int(word) for word in words))


def _load(arguments: argparse.Namespace) -> "tuple[Tokenizer, str]":
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.data.tokenizer import Tokenizer

    path = compose(arguments.overrides, arguments.config_dir).tokenizer.path
    return Tokenizer.load(path), path


def _argument(text: str) -> str:
    from gemma2_jax.config import UserError

    try:
        return sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        raise UserError(
            f"the standard input is not valid UTF-8 (byte 0x{error.object[error.start]:02x})."
        ) from None
