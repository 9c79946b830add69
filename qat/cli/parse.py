"""Parsing a command line: what is wrong becomes one line that names the option, its value and what is expected."""

from __future__ import annotations

import importlib
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from qat.cli.imports import Imports, checked, constructor_hints, typed_names
from qat.cli.words import says_trust
from qat.errors import UNREADABLE, QatError, first_line
from qat.ranges import describe_hint, shown

Hints = Callable[[str], Any]  # annotation of an option by its dotted name; None where it is not known
WRONG = (ArgumentError, ImportError, OSError, *UNREADABLE)
SET_UP = (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError, AssertionError)
UNKNOWN = re.compile(
    r"unrecognized arguments?: (?P<word>\S+)|Group '(?P<group>[^']+)' does not accept option '(?P<inner>[^']+)'"
    r"|does not accept option '(?P<key>[^']+)'|^Option '(?P<alone>[^']+)' is not accepted"
)
KEY = re.compile(r'Parser key "(?P<key>[^"]+)": *(?P<rest>.*)')
NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
IN_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)': (?P<rest>.*)")
NO_OPTION = re.compile(r"Option '([^']+)' is not accepted")
REQUIRED = re.compile(r"arguments? (?:are|is) required: (\S+)|Key \"(\S+)\" is required")
NO_CLASS = re.compile(
    r"Expected a dot import path string: (\S+)|does not correspond to a subclass|Not a valid subclass"
)
NO_CLASS_YET = re.compile(r"NestedArg\(key='([^']+)'")
OTHERS = re.compile(" - (?:Problem with given|Not a valid subclass)")
AFTER_VALUE = re.compile(" - Expected| Subclass types")
VALUE = re.compile(r"(?:Got value|Given value): (.*)$")
MANY = 40  # classes that are not listed any more
IMPORTS = "qat_imports"  # attribute of a parser: what the command line that it has read may import
LONGEST = 300  # characters of a message that is not understood


def read_path(text: str) -> Path:
    """The path that an option gives, in which ``~`` is the home of the user; ValueError for no text."""
    if not str(text):
        raise ValueError("the path is empty")
    return Path(os.path.expanduser(text))


def set_up_paths() -> None:
    """Let every option that is a path be read by `read_path`."""
    for kind in (Path, type(Path())):
        register_type(kind, str, read_path, type_check=isinstance, fail_already_registered=False)


def parse(parser: ArgumentParser, words: Sequence[str], hints: Hints, known: Iterable[str], **how: Any) -> Any:
    """The options of a command line.

    Args:
        parser: reads them.
        words: the command line.
        hints: gives the annotation of an option.
        known: names of all options.
        how: further arguments of ``parse_args``.

    Raises:
        QatError: one line, whatever is wrong.
    """
    set_up_paths()
    imports = Imports(says_trust(words), typed_names(words))
    vars(parser)[IMPORTS] = imports
    try:
        with checked(imports):
            return parser.parse_args(list(words), **how)
    except QatError:
        raise
    except WRONG as error:
        if imports.refused:
            raise QatError(imports.refused[0]) from None
        _explain(error, hints, list(known))


def instantiate(parser: ArgumentParser, config: Any) -> Any:
    """The objects that options describe; QatError for what their constructors refuse.

    The options are in the constructors' own words where they are those of other packages.
    """
    try:
        with checked(imports_of(parser)):
            return parser.instantiate(config)
    except QatError:
        raise
    except SET_UP as error:
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None and not isinstance(cause, QatError):
            cause = inner
        raise QatError(f"{'' if isinstance(cause, QatError) else _builder(cause)}{_flat(cause)}") from error


def imports_of(parser: ArgumentParser) -> Imports:
    """What the command line that a parser has read may import; without one, our own packages."""
    found = vars(parser).get(IMPORTS, Imports())
    assert isinstance(found, Imports)
    return found


def _builder(error: BaseException) -> str:
    """The class whose constructor has raised an error, and a colon."""
    found, frame = "", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "__init__" and "self" in frame.tb_frame.f_locals:
            found = f"{type(frame.tb_frame.f_locals['self']).__name__}: "
        frame = frame.tb_next
    return found


def hints_of(groups: Mapping[str, Any]) -> Hints:
    """A function from the dotted name of an option to its annotation.

    Args:
        groups: by name, a dataclass or a table of annotations; the options of no group are under "".
    """

    def find(key: str) -> Any:
        group, _, name = key.rpartition(".")
        found = groups.get(group, {})
        table = found if isinstance(found, Mapping) else get_type_hints(found, include_extras=True)
        return table.get(name)

    return find


def unknown_option(name: str, known: Sequence[str]) -> QatError:
    """The error for an option that does not exist, with the nearest one that does."""
    bare = name.lstrip("-").partition("=")[0]
    near = _nearest(bare, known)
    dashes = "--" if name.startswith("-") else ""
    hint = f"did you mean {dashes}{near[0]}?" if near else "`qat VERB --help` lists the options"
    return QatError(f"no option {dashes}{bare}: {hint}" if dashes or "." in bare else f"no option {bare!r}: {hint}")


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The option that is most like a name: of the group that is most like its group, or of the same name in another."""
    group, _, last = name.rpartition(".")
    table: dict[str, list[str]] = {}
    for key in known:
        table.setdefault(key.rpartition(".")[0], []).append(key.rpartition(".")[2])
    for other in [group] if group in table else get_close_matches(group, table, n=1):
        if near := get_close_matches(last, table[other], n=1, cutoff=0.65):
            return [f"{other}.{near[0]}".lstrip(".")]
    return [f"{other}.{last}".lstrip(".") for other, names in table.items() if last in names][:1]


def _explain(error: BaseException, hints: Hints, known: Sequence[str]) -> NoReturn:
    """Raise QatError that says in one line what is wrong."""
    text = _flat(error)
    if found := UNKNOWN.search(text):
        raise unknown_option(".".join(name for name in found.groups() if name), known) from None
    if found := NO_VALUE.search(text):
        raise QatError(f"{found[1].rpartition('/')[2]} stands without a value: give one after it") from None
    if found := REQUIRED.search(text) if not IN_CLASS.search(text) else None:
        name = (found[1] or found[2]).rstrip(",")
        raise QatError(f"{name} is not given, and it has no default") from None
    if found := KEY.search(text):
        key, nested = found["key"], None if IN_CLASS.search(text) else NO_CLASS_YET.search(text)
        if nested is not None:
            raise QatError(f"{key}.{nested[1]} is given, but {key} is not: name its class before, as --{key} NAME")
        raise _of_key(key, found["rest"], hints(key)) from None
    raise QatError(text if len(text) < LONGEST else f"{text[:LONGEST]}...") from None


def _of_key(key: str, text: str, hint: Any) -> QatError:
    """What is wrong with the value of an option that exists."""
    if found := IN_CLASS.search(text):
        return _in_class(key, found["path"], found["rest"])
    given = VALUE.search(text)
    named = next((part for part in NO_CLASS.findall(text) if part), "")
    value = AFTER_VALUE.split(given[1])[0] if given else named
    if found := NO_CLASS.search(text):
        return _no_class(key, found[1] or value, hint)
    if "Unable to load config" in text:
        return QatError(f"{key} is a group of options: give each as --{key}.NAME VALUE, or write them in a --config")
    expected = describe_hint(hint) if hint is not None else "another value"
    return QatError(f"{key} is {_cut(value)}: give {expected}")


def _in_class(key: str, path: str, text: str) -> QatError:
    """What is wrong with an option of a class that an option names."""
    name = path.rpartition(".")[2]
    kind, text = _import(path), OTHERS.split(text)[0]  # what other members of a union would take follows
    hints = constructor_hints(kind) if kind is not None else {}
    if found := NO_OPTION.search(text):
        near = get_close_matches(found[1], hints, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(k for k in hints if k != 'return')}"
        return QatError(f"{key}: {name} has no option {found[1]!r}: {hint}")
    if found := REQUIRED.search(text):
        return QatError(f"{key}: {name} needs {(found[1] or found[2]).rstrip(',')}: give it in its init_args")
    if found := KEY.search(text):
        return _of_key(f"{key}: {name}.{found['key']}", found["rest"], hints.get(found["key"]))
    return QatError(f"{key}: {name}: {_cut(text)}")


def _no_class(key: str, value: str, hint: Any) -> QatError:
    """A class that does not exist, or is of another kind."""
    kinds = _subclasses(hint)
    near = get_close_matches(value.rpartition(".")[2], kinds, n=1)
    if near:
        way_out = f"did you mean {near[0]}?"
    elif 0 < len(kinds) < MANY:
        way_out = f"choose from {', '.join(sorted(kinds))}"
    else:
        way_out = "give its name, or its dotted path if it is a class of your own"
    return QatError(f"{key} is {_cut(value)}: no such class can be used here; {way_out}")


def _subclasses(hint: Any) -> list[str]:
    """Names of the classes that an option can name, as far as they are imported."""
    found: dict[str, None] = {}
    for part in getattr(hint, "__args__", (hint,)):
        if isinstance(part, type) and part.__module__.partition(".")[0] not in ("builtins", "pathlib"):
            waiting = [part]
            while waiting:
                waiting += (kind := waiting.pop()).__subclasses__()
                named = not getattr(kind, "__abstractmethods__", ()) and "<locals>" not in kind.__qualname__
                found |= {kind.__name__: None} if named else {}
        elif hasattr(part, "__args__"):
            found |= dict.fromkeys(_subclasses(part))
    return [name for name in found if not name.startswith("_")]


def _import(path: str) -> Any:
    """A class that the parser has imported already."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split()) or first_line(error) if isinstance(error, Exception) else str(error)


def _cut(value: str) -> str:
    return shown(value) if not value or len(value) > 80 else value
