"""Reading a config file: one line for what is no config, and nothing imported that nobody trusts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UNREADABLE, QatError

LARGEST = 10_000_000  # bytes; a checkpoint given as a config is larger, or no text
SECTIONS = ("model", "data", "trainer", "calibration")
TRUSTED = ("qat", "lightning", "pytorch_lightning", "lightning_fabric", "torch")  # packages that a file may name
LOADED = tuple(f"trainer.{name}" for name in ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"))
NAME = re.compile(r"[A-Za-z_][\w.]*\+?")
DEEPEST = 50  # levels of lists and mappings in one another
WAY_OUT = "a config file may name classes of qat, lightning and torch; for a file that you trust, give --trust true"


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key that stands twice, of which the last would win without a word."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # no option has such a name, and yaml refuses it, or read_config does
        if key.value in seen:
            raise QatError(f"{key.value!r} stands twice, the second time in line {key.start_mark.line + 1}")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config file.

    Raises:
        QatError: it is no regular file, no text in UTF-8, not valid YAML, empty, or has a section without options.
    """
    text = _text(path)
    try:
        content = yaml.load(text, _UniqueKeys)  # it is a SafeLoader
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise QatError(f"config {path} is not valid YAML: {_shortened(error)}") from None
    if content is None:
        raise QatError(f"config {path} is empty: write options such as model: {{arch: deit_tiny_patch16_224}}")
    if not isinstance(content, dict):
        raise QatError(f"config {path} is {_kind(content)}: write options such as model: {{arch: NAME}}")
    for name in SECTIONS:
        if name in content and not isinstance(content[name], dict):
            raise QatError(
                f"config {path}: {name} is {_kind(content[name])}: write the options below it, or leave it out"
            )
    for table in (content, *(content[name] for name in SECTIONS if name in content)):
        if odd := next((key for key in table if not isinstance(key, str) or not NAME.fullmatch(key)), None):
            raise QatError(f"config {path}: {odd!r} is no name of an option")
    return content


def check_trusted(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a config file that names classes of other packages, which would be imported.

    Raises:
        QatError: a class outside the trusted packages, the word ``trust`` itself, which only the user may say, or
            nesting that is too deep to be looked through.
    """
    for key, value in _values(content, path):
        if key.split(".")[-1] == "trust" and value not in (None, False):
            raise QatError(f"config {path} asks to be trusted: only the command line can, with --trust true")
    for name in _foreign(content, path):
        raise QatError(f"config {path} names {name}: {WAY_OUT}")


def is_ours(name: str) -> bool:
    """Whether a dotted name is one of the packages that a file may name; names with ``__`` are for Python alone."""
    parts = name.split(".")
    return parts[0] in TRUSTED and not any(part.startswith("__") for part in parts)


def is_loaded(option: str, value: str, folder: Path = Path()) -> bool:
    """Whether the parser would read a value of the trainer from a file of that name, which nobody has checked."""
    return option.rstrip("+") in LOADED and len(value) < 200 and "\n" not in value and (folder / value).is_file()


def _text(path: Path) -> str:
    if not path.exists():
        raise QatError(f"--config {path}: there is no such file")
    if not path.is_file():
        raise QatError(f"--config {path}: that is no regular file: give a YAML file")
    try:
        if path.stat().st_size > LARGEST:
            raise QatError(f"--config {path}: it is larger than {LARGEST // 10**6} MB: give a YAML file of options")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise QatError(f"--config {path}: it is no text in UTF-8: give a YAML file, in UTF-8") from None
    except OSError as error:
        raise QatError(f"--config {path}: {error.strerror}") from None


def _foreign(content: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Names of classes and functions of other packages that the parser would import."""
    for key, value in _values(content, path):
        if not isinstance(value, str):
            continue
        words = value.strip()
        dotted = "." in words and all(part.isidentifier() for part in words.split("."))
        named = key.startswith(("trainer", "calibration", "model.regularizers", "model.rules"))
        if dotted and not is_ours(words) and (key.endswith("class_path") or (named and _can_be_imported(words))):
            yield words
        if is_loaded(key, value, path.parent):
            yield f"the file {value} as {key}"


def _can_be_imported(name: str) -> bool:
    try:
        return find_spec(name.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _values(content: Any, path: Path, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value in nested data, with its dotted key; text that is YAML again is nested data too.

    Raises:
        QatError: the data is nested too deeply.
    """
    if depth > DEEPEST:
        raise QatError(f"config {path}: {key} is nested deeper than {DEEPEST} levels")
    inner = _as_yaml(content) if isinstance(content, str) else content
    if isinstance(inner, dict):
        for name, value in inner.items():
            yield from _values(value, path, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(inner, list):
        for value in inner:
            yield from _values(value, path, key, depth + 1)
    else:
        yield key, content


def _as_yaml(text: str) -> Any:
    """What the parser may read in a text: a list or a mapping, or else the text itself."""
    if not any(sign in text for sign in "[{:-"):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, *UNREADABLE):
        return text


def _kind(value: Any) -> str:
    return "null" if value is None else f"{value!r}" if isinstance(value, int | float | str) else "a list"


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).replace('in "<unicode string>", ', "").split())
    return text if len(text) < 200 else f"{text[:200]}..."
