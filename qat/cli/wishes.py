"""Which method of calibration for which wish: one table, shown by `qat calibrate --help` and by docs/ptq.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple


class Wish(NamedTuple):
    """A wish, what serves it, and the words of a command that say so."""

    wish: str
    method: str
    recipe: str
    say: str
    remark: str


WISHES = (
    Wish("the fastest", "RepQViT", "repq_vit", "--config configs/ptq/repq_vit.yaml", "takes seconds"),
    Wish("the best accuracy", "Frontier", "frontier", "--config configs/ptq/frontier.yaml", "takes minutes"),
    Wish("integers only", "Observe", "fq_vit_884", "--config configs/ptq/fq_vit.yaml",
         "observer minmax; LayerNorm and softmax are integer too"),
    Wish("a start for training", "OutputSearch", "that of the training", "--calibration.method OutputSearch",
         "or Frontier; with the --config of the training, whose recipe is of Uniform or LSQ"),
)  # fmt: skip


def wishes(width: int) -> Iterator[str]:
    """The table as lines of at most ``width`` columns: a wish and what to say, then what that is."""
    longest = max(len(wish.wish) for wish in WISHES)
    for wish in WISHES:
        yield f"  {wish.wish:{longest}}  {wish.say}"
        indent = " " * (longest + 4)
        text = f"{wish.method}, recipe: {wish.recipe}; {wish.remark}"
        yield from textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
