"""The list of training images in the state of a run: in the middle of a pass no other list may take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qat.data.folder import are_numbers
from qat.data.source import Source, list_of

LIST = "list of images"  # name in the state
OLDER_ORDER = "older versions sorted class folders that are numbers as text, 10 before 2"
LIST_WAY_OUT = f"{OLDER_ORDER}; start from its weights with --model.quant_checkpoint, or resume with those images"


def with_list(state: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """The state of a run with its list of images: the older one for a version that did not store it.

    Args:
        state: of the data module, in a checkpoint.
        source: the training images of this run.
    """
    if LIST in state or not state["batches"] or not are_numbers(set(source.keys)):
        return state
    pairs = sorted(zip(source.keys, source.names, strict=True))
    return {**state, LIST: list_of([name for _, name in pairs])}


def in_older_order(stored: Sequence[str], given: Sequence[str]) -> bool:
    """Whether two lists of classes, or of images in class folders, differ only because numbers were sorted as text."""
    classes = list(dict.fromkeys(name.partition("/")[0] for name in stored))
    alike = stored != given and sorted(stored) == sorted(given)
    return alike and are_numbers(classes) and classes == sorted(classes)
