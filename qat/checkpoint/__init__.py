"""Checkpoints that describe themselves: a card with everything that rebuilds the model lies beside its weights."""

from qat.checkpoint.card import FORMAT, REPLACED_BY_A_CARD, Card
from qat.checkpoint.content import AVERAGED, DATA, KEY, PREFIX, check_run, has_older_groups
from qat.checkpoint.reading import check_restored, find_card, load, load_into, read

__all__ = [
    "AVERAGED",
    "DATA",
    "FORMAT",
    "KEY",
    "PREFIX",
    "REPLACED_BY_A_CARD",
    "Card",
    "check_restored",
    "check_run",
    "find_card",
    "has_older_groups",
    "load",
    "load_into",
    "read",
]
