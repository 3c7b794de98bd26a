"""`gemma2 data`: prepare the text of a configuration, look at what came of it, and check it."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb

DESCRIPTION = """\
Works with the data that a configuration names: text (data.source) is tokenised once into shards in data.folder.

  gemma2 data prepare         makes the shards, and the tokenizer if there is none; training does so by itself
  gemma2 data show            what the folder holds, and the beginning of a training batch
  gemma2 data verify          reads every shard and source file, and reports what has changed
"""
KEYS = """\
the commonest keys:
  data=files data.source='my/*.txt'   text of your own: globs of .txt .md .rst .jsonl .parquet, also .gz .zst
  data.folder=data/mine               where the shards go; each source needs a folder of its own
  data.validation_fraction=0.02       share of the documents that are held out
  data.skip_invalid=10                leave out up to 10 records that cannot be read (0.01: up to 1 % of them)
  tokenizer.path=my.model             the SentencePiece model; trained if it does not exist yet
  tokenizer.vocab_size=8192           the size that it is trained to
"""
PREPARE = """\
Tokenises data.source into data.folder, in parallel, and trains the tokenizer first if tokenizer.path does not
exist. Goes on where it was after a stop, and does nothing if the folder is complete.

  gemma2 data prepare
  gemma2 data prepare data=files data.source='notes/**/*.md' data.folder=data/notes tokenizer.path=data/notes.model
"""
SHOW = """\
Prints how many documents, tokens and characters each split holds, and how the first training batch is packed.

  gemma2 data show
  gemma2 data show --rows 16 data=files data.source='notes/**/*.md' data.folder=data/notes
"""
VERIFY = """\
Reads every shard of data.folder and compares it with the checksum taken when it was written: after a copy, or
when a disk is in doubt. Then reads the files that the folder was prepared from, if they are there, and compares
their content. Names the first file that differs, and then exits with 1.

  gemma2 data verify
  gemma2 data verify data.folder=data/notes
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "data", "prepare text for training, look at it, check it", DESCRIPTION)
    help_prepare = "tokenise the source, if that is not done yet"
    add_overrides(add_verb(actions, "prepare", prepare, help_prepare, PREPARE, KEYS, resumes=True))
    parser = add_verb(actions, "show", show, "print what a prepared folder holds", SHOW, KEYS)
    parser.add_argument(
        "--rows", type=int, default=4, metavar="N", help="how many rows of the first training batch (4)"
    )
    add_overrides(parser)
    add_overrides(add_verb(actions, "verify", verify, "check the shards of a prepared folder", VERIFY, KEYS))


def prepare(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.data import prepare as preparation

    config = compose(arguments.overrides, arguments.config_dir)
    preparation.prepare(config.data, config.tokenizer)
    print(f"{config.data.folder} is prepared; `gemma2 data show` shows what it holds.")


def show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import UserError
    from gemma2_jax.data.pipeline import train_batches
    from gemma2_jax.data.shards import read_data_manifest
    from gemma2_jax.data.tokenizer import Tokenizer
    from gemma2_jax.studies.tables import Table

    if arguments.rows < 0:
        raise UserError(f"--rows is {arguments.rows}; it must be at least 0.")
    config = compose(arguments.overrides, arguments.config_dir)
    manifest = read_data_manifest(config.data.folder)
    splits = [
        [split, *(f"{number:,}" for number in (counts.documents, counts.tokens, counts.characters))]
        for split, counts in (("train", manifest.train), ("validation", manifest.validation))
    ]
    Table(["split", "documents", "tokens", "characters"], splits).print(Console(), config.data.folder)
    if manifest.skipped.records:
        print(f"left out: {manifest.skipped}")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    batch = next(train_batches(config.data))
    rows = min(arguments.rows, len(batch.tokens))
    more = "" if rows == len(batch.tokens) else f"; --rows {len(batch.tokens)} shows all"
    print(
        f"\n{rows} of the first training batch's {len(batch.tokens)} rows{more}: documents in it, and how it begins"
    )
    for tokens, segments in list(zip(batch.tokens, batch.segment_ids, strict=True))[:rows]:
        print(f"  {segments.max():>3}  {tokenizer.decode(tokens[:40].tolist())!r}")


def verify(arguments: argparse.Namespace) -> None:
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.data import shards
    from gemma2_jax.data.prepare import verify_source

    config = compose(arguments.overrides, arguments.config_dir)
    folder = config.data.folder
    count = shards.verify(folder)
    print(f"{folder}: {count} shards were read; all match their checksums.")
    source = list(shards.read_data_manifest(folder).source)
    if verify_source(folder):
        print(f"{folder}: the files of data.source {source} are those that it was prepared from.")
    else:
        print(f"{folder}: data.source {source} is not there, and so was not compared.")
