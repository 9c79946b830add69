"""What the parser may import: our own packages and what the user has typed; a file says more only with --trust true.

`qat.cli.config_file` looks through the files before. Here is the last word: whatever way a name takes to the parser, it
is checked where it would be imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any, get_type_hints

from qat.cli.config_file import WAY_OUT, is_ours
from qat.errors import QatError

CLASSES = ("trainer.", "calibration.", "model.regularizers", "model.rules")  # options that name classes
DOTTED = re.compile(r"\w+(?:\.\w+)+")
FROM_CODE = ("jsonargparse._util", "jsonargparse.typing")  # names that annotations have, not values


@dataclass
class Imports:
    """What one command may import.

    Args:
        trust: everything may be imported.
        names: dotted names of other packages that may be imported, because they were typed.
        refused: why names were refused; the parser may have gone on with the next type that an option can have.
    """

    trust: bool = False
    names: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    def check(self, name: Any) -> None:
        """Raise QatError for a name that may not be imported; what is no dotted name is left to the parser."""
        dotted = isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))
        if dotted and not self.trust and not is_ours(name) and name not in self.names:
            self._refuse(f"{name} is named by a file: {WAY_OUT}")

    def accept(self, name: str, found: Any) -> None:
        """Raise QatError for an object that is foreign under a name that is not; the parser may name it otherwise."""
        module = _module_of(found)
        own_name = f"{module}.{getattr(found, '__qualname__', '')}".rstrip(".")
        if name in self.names:
            self.names |= {own_name, importlib.import_module("jsonargparse._util").get_import_path(found)}
        elif not self.trust and not is_ours(f"{module}.x") and own_name not in self.names:
            self._refuse(f"{name} is named by a file, and it is {own_name}: {WAY_OUT}")

    def _refuse(self, reason: str) -> None:
        self.refused.append(reason)
        raise QatError(reason)


_current: ContextVar[Imports | None] = ContextVar("imports", default=None)


def typed_names(words: Sequence[str]) -> set[str]:
    """The dotted names in the values of those options of a command line that name classes."""
    found, option = set(), ""
    for word in words:
        if word.startswith("--"):
            option, _, word = word[2:].partition("=")
        if option.startswith(CLASSES):
            found |= set(DOTTED.findall(word))
    return found


@contextmanager
def checked(imports: Imports) -> Iterator[None]:
    """Let the parser import only what is allowed.

    Raises:
        RuntimeError: this version of jsonargparse imports in another way than those that are known.
    """
    _wrap()
    token = _current.set(imports)
    imports.refused.clear()
    try:
        yield
    finally:
        _current.reset(token)


def _wrap() -> None:
    """Put the check in front of ``import_object`` in every module of jsonargparse that imports what a value names."""
    original: Any = getattr(importlib.import_module("jsonargparse._util"), "import_object", None)
    importlib.import_module("jsonargparse._typehints")
    users = [module for name, module in sys.modules.items() if name.startswith("jsonargparse.")]
    for module in users:
        found = vars(module).get("import_object")
        if found is not None and found is original and module.__name__ not in FROM_CODE:
            vars(module)["import_object"] = _with_check(found)
    if not hasattr(getattr(sys.modules["jsonargparse._typehints"], "import_object", None), "checks"):
        raise RuntimeError("this version of jsonargparse has no import_object: take one from 4.51 to 4.53")


def _with_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def import_object(name: Any, *args: Any, **kwargs: Any) -> Any:
        imports = _current.get()
        if imports is None:
            return original(name, *args, **kwargs)
        imports.check(name)
        found = original(name, *args, **kwargs)
        imports.accept(name, found)
        return found

    vars(import_object)["checks"] = True
    return import_object


def _module_of(found: Any) -> str:
    """The module that an object is from; of a method of C code, that of its class."""
    if isinstance(found, ModuleType):
        return found.__name__
    if isinstance(module := getattr(found, "__module__", None), str):
        return module
    owner = getattr(found, "__self__", found)
    return owner.__name__ if isinstance(owner, ModuleType) else str(getattr(owner, "__module__", "builtins"))


def constructor_hints(kind: type) -> dict[str, Any]:
    """The annotations of what a class is built with; a dataclass may inherit some, whose names its own file lacks."""
    if not is_dataclass(kind):
        return get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}
