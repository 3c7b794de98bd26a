"""Checks that prepared data has the settings of a configuration, and that a model learns from it to end its turns."""

from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError, as_override
from gemma2_jax.data.config import ConversationsConfig, DataConfig
from gemma2_jax.data.invalid import check_skipped
from gemma2_jax.data.shards import MIXTURE_FORMAT, DataManifest
from gemma2_jax.data.source_content import unused_sibling
from gemma2_jax.data.tokenizer import Tokenizer


def refuse_other_settings(manifest: DataManifest, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if a folder was prepared with other settings or another tokenizer."""
    refuse_other_conversations(manifest, data)
    values = (
        ("data.text_field", manifest.text_field, data.text_field),
        ("data.validation_fraction", manifest.validation_fraction, data.validation_fraction),
        ("tokenizer", manifest.tokenizer[:12], tokenizer.fingerprint[:12]),
    )
    others = [f"a different {key} ({was}, now {now})" for key, was, now in values if was != now]
    if others:
        typed = [as_override(key, was) for key, was, now in values[:2] if was != now]
        remedy = (
            f"write {' '.join(filter(None, typed))} to use it, "
            if any(typed) and len(typed) == len(others)
            else ""
        )
        raise _other(data, f"with {', '.join(others)}", remedy)


def refuse_other_conversations(manifest: DataManifest, data: DataConfig) -> None:
    """Raises UserError if a folder holds text instead of conversations, the reverse, or other settings made it."""
    if (manifest.format == MIXTURE_FORMAT) != bool(data.mixture):
        source, other = ("data.source", "data.mixture")[:: 1 if data.mixture else -1]
        raise _other(data, f"from {source}, but the configuration has {other}", "")
    was = _settings(manifest.conversations)
    now = _settings(data.conversations if data.with_conversations else None)
    if bool(was) != bool(now):
        kinds = ("conversations", "text") if was else ("text", "conversations")
        group = "conversations" if was else "files"
        raise _other(
            data,
            f"from {kinds[0]}, but the configuration is of {kinds[1]}",
            f"write data={group} to use it, ",
        )
    others = {key: value for key, value in was.items() if value != now[key]}
    if others:
        listed = ", ".join(f"a different {key} ({value}, now {now[key]})" for key, value in others.items())
        typed = " ".join(str(as_override(key, value)) for key, value in others.items())
        raise _other(data, f"with {listed}", f"write {typed} to use it, ")


def _settings(conversations: ConversationsConfig | None) -> dict[str, Any]:
    if conversations is None:
        return {}
    return {f"data.conversations.{name}": value for name, value in vars(conversations).items()}


def _other(data: DataConfig, how: str, remedy: str) -> UserError:
    return UserError(
        f"data.folder {data.folder} was prepared {how}; {remedy}set another folder, as in "
        f"data.folder={unused_sibling(Path(data.folder))}, or delete this one."
    )


def refuse_other_skips(manifest: DataManifest, data: DataConfig) -> None:
    """Raises UserError if more records were skipped than allowed. Call it after the content was compared."""
    check_skipped(manifest.skipped, data.skip_invalid, f"data.folder {data.folder} was prepared without {{}}")


def refuse_unusable_conversations(manifest: DataManifest, data: DataConfig) -> None:
    """Raises UserError if a model could not learn from conversations to end its turns, or not be evaluated on them.

    A model learns that only from an <end_of_turn> that carries loss. None is left if every conversation's first turn
    of the model ends after data.seq_len tokens, or, with data.too_long=drop, if every conversation is longer.
    """
    if manifest.conversations is None:
        return
    train, held_out = manifest.train_lengths, manifest.validation_lengths
    for split, lengths in (("to train on", train), ("held out", held_out)):
        count = lengths.conversations
        if data.too_long == "drop" and count and lengths.longer(data.seq_len) == count:
            raise UserError(
                f"data.too_long is drop, and all {count:,} conversations {split} are longer than data.seq_len "
                f"({data.seq_len}); the shortest needs data.seq_len={min(lengths.all)}."
            )
    if train.conversations and not train.with_end(data.seq_len):
        needed = f"; data.seq_len={min(train.to_end)} is enough for one" if train.to_end else ""
        raise UserError(
            f"In the conversations of data.folder {data.folder}, no <end_of_turn> within data.seq_len "
            f"({data.seq_len}) tokens carries loss, so a model would not learn to end its turns{needed}."
        )
    if held_out.conversations and not held_out.with_loss(data.seq_len):
        raise UserError(
            f"In the held-out conversations of data.folder {data.folder}, nothing within data.seq_len "
            f"({data.seq_len}) tokens carries loss; data.seq_len={min(held_out.to_loss)} is enough for one."
        )


def cut_note(manifest: DataManifest, data: DataConfig) -> str | None:
    """Returns how many conversations to train on are truncated or dropped, or None if there are none."""
    lengths = manifest.train_lengths
    longer = lengths.longer(data.seq_len)
    if not longer:
        return None
    note = (
        f"{longer:,} of {lengths.conversations:,} conversations to train on are longer than data.seq_len "
        f"({data.seq_len})"
    )
    if data.too_long == "drop":
        return f"{note} and dropped"
    lost = lengths.conversations - lengths.with_loss(data.seq_len)
    return f"{note} and truncated" + (f", {lost:,} of them left out since no loss remains" if lost else "")
