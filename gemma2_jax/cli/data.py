"""`gemma2 data`: prepares the text or conversations of a configuration, shows the result, and checks it."""

import argparse

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb

DESCRIPTION = """\
Manages the data of a configuration: the text (data.source) is tokenised once into shards in data.folder.

  gemma2 data prepare         writes the shards, and trains the tokenizer if there is none; training does this too
  gemma2 data show            prints what the folder holds, and the first rows of a training batch
  gemma2 data verify          reads every shard and source file, and reports changes
"""
KEYS = """\
common keys:
  data=files data.source='my/*.txt'   your own text: globs of .txt .md .rst .jsonl .parquet, also .gz .zst
  data=conversations data.source='chats/*.jsonl'   your own conversations: globs of .jsonl .parquet, also .gz .zst
  data.folder=data/mine               the folder of the shards; use one folder per source
  data.validation_fraction=0.02       fraction of the documents held out
  data.skip_invalid=10                skip up to 10 unreadable records (0.01: up to 1 % of all)
  tokenizer.path=my.model             the SentencePiece model; trained if it does not exist yet
  tokenizer.vocab_size=8192           its size when it is trained
"""
PREPARE = """\
Tokenises data.source into data.folder, in parallel, and trains the tokenizer first if tokenizer.path does not
exist. Resumes after an interruption, and does nothing if the folder is complete.

  gemma2 data prepare
  gemma2 data prepare data=files data.source='notes/**/*.md' data.folder=data/notes tokenizer.path=data/notes.model
"""
SHOW = """\
Prints how many documents, tokens and characters each split holds, and how the first training batch is packed. Of
conversations, the tokens that carry loss are coloured in a terminal, and between « and » elsewhere.

  gemma2 data show
  gemma2 data show --rows 16 data=files data.source='notes/**/*.md' data.folder=data/notes
  gemma2 data show data=conversations data.source='chats/*.jsonl' data.folder=data/chats
"""
VERIFY = """\
Reads every shard of data.folder and compares it with the checksum from the time of writing; use it after a copy, or if
you suspect a disk. Then compares the content of the source files, if they exist, with the content that was prepared.
If a file differs, names the first such file and exits with 1.

  gemma2 data verify
  gemma2 data verify data.folder=data/notes
"""


def add_parser(verbs: Verbs) -> None:
    actions = add_actions(verbs, "data", "prepare text for training, show it, check it", DESCRIPTION)
    help_prepare = "tokenise the source, if that has not been done"
    add_overrides(add_verb(actions, "prepare", prepare, help_prepare, PREPARE, KEYS, resumes=True))
    parser = add_verb(actions, "show", show, "print what a prepared folder holds", SHOW, KEYS)
    parser.add_argument(
        "--rows",
        type=int,
        default=4,
        metavar="N",
        help="number of rows of the first training batch to show (4)",
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
    from gemma2_jax.cli.loss_marks import show_loss
    from gemma2_jax.config import UserError
    from gemma2_jax.data.pipeline import train_batches
    from gemma2_jax.data.prepared_settings import cut_note
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
        print(f"skipped: {manifest.skipped}")
    if note := cut_note(manifest, config.data):
        print(note)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    batch = next(train_batches(config.data))
    rows = min(arguments.rows, len(batch.tokens))
    more = "" if rows == len(batch.tokens) else f"; --rows {len(batch.tokens)} shows all"
    if manifest.conversations is not None:
        unit = "document" if config.data.mixture else "conversation"
        print(
            f"\n{rows} of the first training batch's {len(batch.tokens)} rows{more}: {unit}s, loss in ",
            end="",
        )
        show_loss(Console(highlight=False), batch, rows, tokenizer, unit)
        return
    print(
        f"\n{rows} of the first training batch's {len(batch.tokens)} rows{more}: number of documents, and first tokens"
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
        print(f"{folder}: data.source {source} has the content that was prepared.")
    else:
        print(f"{folder}: data.source {source} was not found, so its content was not compared.")
