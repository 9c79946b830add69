"""Quantizers by name: how the specs in recipes, options and checkpoints become objects, and what is imported for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from qat.errors import QatError, first_line
from qat.quantizers.spec import Spec
from qat.ranges import shown


def spec_from_dict(spec: Any, trust: bool = False) -> Spec:
    """Build a Spec from ``{class_path, init_args}``.

    Args:
        spec: plain data; a class outside the package is named by its dotted path.
        trust: such a class may be imported; otherwise it is found only where the program has imported it before.
    """
    spec = plain(spec)
    if not isinstance(spec, Mapping):
        raise QatError(f"spec {shown(spec)} is no mapping: write {{class_path: LSQ, init_args: {{bits: 4}}}} or null")
    check_keys(spec, ("class_path", "init_args"), required=("class_path",), where="spec")
    kind = _find_kind(spec["class_path"], trust)
    options = plain(spec.get("init_args") or {})
    if not isinstance(options, Mapping):
        raise QatError(f"init_args of {kind.__name__} is {shown(options)}: write {{bits: 4, ...}}")
    check_keys(options, [f.name for f in fields(kind)], required=("bits",), where=kind.__name__)
    try:
        return kind(**options)
    except TypeError as error:  # two options that cannot be compared, for example
        raise QatError(f"{kind.__name__} does not take {shown(dict(options))}: {first_line(error)}") from None


def _find_kind(class_path: Any, trust: bool) -> type[Spec]:
    if not isinstance(class_path, str):
        raise QatError(f"class_path is {shown(class_path)}: give the name of a quantizer class")
    if class_path in Spec.kinds:
        return Spec.kinds[class_path]
    if "." not in class_path:
        raise QatError(f"no quantizer is called {class_path!r}: choose from {', '.join(sorted(Spec.kinds))}")
    known = {f"qat.quantizers.{name}": kind for name, kind in Spec.kinds.items() if kind.__module__.startswith("qat.")}
    known |= {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(Spec)}
    if class_path in known:
        return known[class_path]
    if class_path.startswith("qat."):  # ours are known by now: to import a module of qat is never needed
        raise QatError(f"{class_path!r} is no quantizer of qat: choose from {', '.join(sorted(Spec.kinds))}")
    if not trust:
        raise QatError(
            f"quantizer {class_path!r} is no part of qat, and importing it would run its code: if you trust it, give "
            "--trust true (trust=True in Python)"
        )
    return _import_kind(class_path)


def _import_kind(class_path: str) -> type[Spec]:
    """The class that a dotted path names, from a module that is imported for it."""
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:  # the code of a module can raise anything
        raise QatError(f"cannot import the quantizer {class_path!r}: {first_line(error)}") from None
    if not (isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec):
        raise QatError(f"{class_path!r} is no quantizer: give a dataclass that derives from qat.quantizers.Spec")
    return kind


def _subclasses(kind: type[Spec]) -> Iterator[type[Spec]]:
    """Every class that derives from ``kind`` and exists in this program; a later definition of a name comes later."""
    for derived in kind.__subclasses__():
        yield derived
        yield from _subclasses(derived)


def plain(value: Any) -> Any:
    """A mapping in place of what jsonargparse makes of one that has a ``class_path``."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def check_keys(given: Mapping[str, Any], known: Sequence[str], required: Sequence[str], where: str) -> None:
    """Raise QatError, which names the place ``where``, for a key that is not known or one that is missing."""
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise QatError(f"{where} has no option {key!r}: {hint}")
    for key in required:
        if key not in given:
            raise QatError(f"{where} lacks {key!r}")
