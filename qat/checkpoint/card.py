"""The card of a checkpoint: what rebuilds its model, as plain data, checked field by field before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, get_type_hints

import torch
from torch import nn

from qat.errors import QatError
from qat.model_args import check_model_args
from qat.models import build_float
from qat.models.arch import check_arch, default_preprocessing, has_one_size, without_tag
from qat.preprocessing import FIELDS, Preprocessing, check_partial
from qat.quantizers import Spec
from qat.quantizers.named import check_keys
from qat.ranges import Range, check_value, shown
from qat.recipe import Rule
from qat.sites.insert import quantize, sites

FORMAT = 1
DEPTH = 8  # lists and mappings inside each other
MOST = 1_000_000  # entries and letters: the names of 22,000 classes are 400,000
SHOWN = 500  # characters of an error
DAMAGED = "the file is damaged, or was not written by qat"
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about its model; plain data only, so it loads under ``weights_only=True``.

    This is the one list of what has to agree where a checkpoint meets options or another model.

    Args:
        arch: timm model name.
        model_args: further arguments of the timm constructor.
        num_classes: outputs of the head.
        rules: the resolved recipe, widths as integers.
        preprocessing: fields of `Preprocessing`.
        classes: class names in label order, empty when unknown.
    """

    arch: str
    model_args: dict[str, Any]
    num_classes: Annotated[int, Range(2, 1_000_000)]
    rules: list[dict[str, Any]]
    preprocessing: dict[str, Any]
    classes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What is stored under the key ``qat`` of a checkpoint."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, stored: Any, source: str, trust: bool = False) -> Card:
        """Read what `to_dict` made.

        Args:
            stored: plain data.
            source: what the errors call the checkpoint.
            trust: quantizers that it names by a dotted path may be imported.

        Raises:
            QatError: another format, a field that is missing, of a wrong type or out of its range, or an unknown class.
        """
        if not isinstance(stored, Mapping):
            raise QatError(f"{source}: its card is a {type(stored).__name__}, not a mapping: {DAMAGED}")
        if type(number := stored.get("format")) is not int or number != FORMAT:
            found = shown(number) if isinstance(number, PLAIN) else f"a {type(number).__name__}"
            raise QatError(f"{source} has format {found}, this version of qat reads format {FORMAT}")
        hints = get_type_hints(cls, include_extras=True)
        for name, value in stored.items():
            check_plain(value, f"{source}: {shown(name)}" if name not in hints else f"{source}: {name}")
        for name, hint in hints.items():
            if name not in stored:
                raise QatError(f"{source}: its card lacks {name!r}: {DAMAGED}")
            check_value(f"{source}: {name}", stored[name], hint)
        card = cls(**{name: stored[name] for name in hints})
        try:
            card._check(trust)
        except QatError as error:
            text = str(error)  # it may show a value of a damaged file at any length
            raise QatError(f"{source}: {text if len(text) <= SHOWN else f'{text[:SHOWN]}...'}") from None
        return card

    def _check(self, trust: bool) -> None:
        """Raise QatError for a value that no model can be built from, without building one."""
        if ":" in self.arch:
            raise QatError(f"arch is {shown(self.arch)}, which needs another file: a checkpoint names a model of timm")
        check_arch(self.arch)
        check_model_args(self.model_args, "model_args")
        for stored in self.rules:
            rule = Rule.from_dict(stored, trust)
            if rule.spec is not None and not isinstance(rule.spec.bits, int):
                raise QatError(f"rule {rule.match!r}: bits is the word {rule.spec.bits!r}, not a width")
        names = list(FIELDS)
        check_keys(self.preprocessing, names, required=names, where="preprocessing")
        check_partial(self.preprocessing)
        size = Preprocessing(**self.preprocessing).size
        own = default_preprocessing(self.arch, self.model_args).size
        if size != own and has_one_size(self.arch, self.model_args):
            raise QatError(f"preprocessing.size is {size}, but the model takes {own} pixels")
        if self.classes and len(self.classes) != self.num_classes:
            raise QatError(f"{len(self.classes)} names of classes, but num_classes is {self.num_classes}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise QatError(f"the class {shown(twice)} is named twice")

    def build(self) -> nn.Module:
        """The quantized model with random weights and uncalibrated steps."""
        model = build_float(self.arch, None, self.num_classes, self.model_args)
        return quantize(model, [Rule.from_dict(rule) for rule in self.rules]) if self.rules else model

    def options(self) -> dict[str, Any]:
        """The options under ``model`` that the card replaces, with the values that build its model again."""
        resolved = {"recipe": "float", "w_bits": None, "a_bits": None}
        weights = {"checkpoint": None, "checkpoint_key": None, "quant_checkpoint": None, "fresh_head": False}
        return {**asdict(self), **resolved, **weights}

    def difference(self, other: Card, evaluates_alike: bool = False) -> str | None:
        """The name of the first field in which two cards differ, or None where weights of one fit the other.

        Args:
            other: card to compare with.
            evaluates_alike: preprocessing must agree too, and class names where both cards have them.
        """
        names = ["arch", "model_args", "num_classes", "rules"]
        if evaluates_alike:
            names += ["preprocessing", *(["classes"] if self.classes and other.classes else [])]
        different = (name for name in names if getattr(self, name) != getattr(other, name))
        return next((name for name in different if self._differs(other, name)), None)

    def _differs(self, other: Card, name: str) -> bool:
        """Whether values that are not equal mean different things."""
        if name == "arch":
            return without_tag(self.arch) != without_tag(other.arch)
        return name != "rules" or self.other_site(other) is not None

    def other_site(self, other: Card) -> tuple[str, Spec | None, Spec | None] | None:
        """The first site that two cards of one architecture quantize differently, and how; None where none is."""
        for (name, mine), (_, theirs) in zip(self._specs(), other._specs(), strict=True):
            if mine != theirs:
                return name, mine, theirs
        return None

    def _specs(self) -> list[tuple[str, Spec | None]]:
        """The name of every site, and the quantizer that the rules give it: other rules may say the same."""
        with torch.device("meta"):
            return [(name, getattr(site, "spec", None)) for name, site in sites(self.build())]


def check_plain(value: Any, name: str) -> None:
    """Raise QatError unless a value is made of numbers, text, lists and mappings, few inside each other and few in all.

    Args:
        value: what a file holds; its parts may refer to each other, so that it is far larger than the file.
        name: what the error calls it.
    """
    left, seen = [(value, 0)], 0
    while left:
        part, depth = left.pop()
        if isinstance(part, Mapping):
            if wrong := [key for key in part if not isinstance(key, str)]:
                raise QatError(f"{name} has a key that is a {type(wrong[0]).__name__}, not text: {DAMAGED}")
            part = [*part, *part.values()]
        seen += len(part) if isinstance(part, str | list | tuple) else 1
        if depth > DEPTH or seen > MOST:
            what = f"{DEPTH} lists and mappings inside each other" if depth > DEPTH else f"{MOST} entries and letters"
            raise QatError(f"{name} has more than {what}: {DAMAGED}")
        if isinstance(part, list | tuple):
            left += [(item, depth + 1) for item in part]
        elif not isinstance(part, PLAIN):
            raise QatError(f"{name} holds a {type(part).__name__}, and it holds plain data only: {DAMAGED}")


REPLACED_BY_A_CARD = frozenset(Card("", {}, 0, [], {}, []).options())  # names of options
