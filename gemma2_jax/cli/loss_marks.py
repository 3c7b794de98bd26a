"""Rows of a batch as text in which the tokens with loss are marked."""

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer

_LOSS, _REST = "bold green", "dim"
_SHOWN = 3  # conversations or documents of a row


def show_loss(console: Console, batch: Batch, rows: int, tokenizer: Tokenizer, unit: str) -> None:
    """Prints the conversations of the first rows: what carries loss in colour, or between « and » without colours.

    Args:
        unit: the word for what the rows hold, in the singular.
    """
    coloured = console.color_system is not None and not console.no_color
    console.print(Text("this colour", _LOSS) if coloured else "« »")
    for row in range(rows):
        ids, mask = batch.segment_ids[row], batch.loss_mask[row]
        units = unit if ids.max() == 1 else f"{unit}s"
        console.print(
            f"row {row + 1}: {ids.max()} {units} of {np.sum(ids > 0):,} tokens, {np.sum(mask > 0):,} with loss, "
            f"{np.sum(ids == 0):,} of padding"
        )
        for segment in range(1, min(_SHOWN, int(ids.max())) + 1):
            at = ids == segment
            tokens = [int(batch.tokens[row][at][0]), *batch.targets[row][at].tolist()]
            console.print(
                _marked(tokens, [False, *(mask[at] > 0).tolist()], coloured, tokenizer), soft_wrap=True
            )
        if (more := int(ids.max()) - _SHOWN) > 0:
            console.print(f"… and {more} more")


def _marked(tokens: list[int], loss: list[bool], coloured: bool, tokenizer: Tokenizer) -> Text:
    text = Text()
    for carries, group in groupby(zip(tokens, loss, strict=True), key=lambda pair: pair[1]):
        part = tokenizer.decode(token for token, _ in group)
        if coloured:
            text.append(part, _LOSS if carries else _REST)
        else:
            text.append(f"«{part}»" if carries else part)
    return text
