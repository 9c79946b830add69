"""Config files as they are written: with configs that they start from, and with names that classes had before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from qat.errors import QatError

FLAGS = ("-c", "--config")
MOVED = {"qat.regularizers.": "qat.training.regularizers."}  # class paths that older runs wrote into their config.yaml


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, where every config is preceded by those that its key ``base`` names.

    Raises:
        QatError: a config that is its own base, or ``--base`` on the command line.
    """
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--base":
            raise QatError("base stands inside a config; on the command line, give --config once for each file")
        if flag.startswith("--co") and "--config".startswith(flag) and flag != "--config":
            raise QatError(f"{flag} is short for --config: write it out")  # the parser would read it without its base
        if flag not in FLAGS:
            found.append(word)
            continue
        value = value or next(words, "")
        if "base:" in value:
            raise QatError(f"base stands inside a config file, not in the text of an option: {value}")
        for path in [*_bases(Path(value), ()), value]:
            found += ["--config", str(path)]
    return found


def given_configs(arguments: Sequence[str]) -> list[str]:
    """The config files that a command names."""
    found = []
    for word, after in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, _, value = word.partition("=")
        if flag in FLAGS:
            found.append(value or after)
    return found


def _bases(path: Path, inside: tuple[Path, ...]) -> list[Path]:
    """The files that a config starts from, the farthest first."""
    if path.resolve() in inside:
        raise QatError(f"config {path} is its own base: {' -> '.join(map(str, (*inside, path)))}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []  # the parser says what is wrong with the file
    named = content.get("base") if isinstance(content, dict) else None
    names = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in names):
        raise QatError(f"config {path}: base is {named}: give the path of a config, or a list of paths")
    bases = [path.parent / name for name in names]
    for base in bases:
        if not base.is_file():
            raise QatError(f"config {path}: there is no base {base}")
    return [file for base in bases for file in (*_bases(base, (*inside, path.resolve())), base)]


def read_old_class_paths() -> None:
    """Let configs name classes as they were named before they moved."""
    default = get_loader("yaml")
    if default.__module__ == __name__:  # it is ours already
        return

    def load(text: str) -> Any:
        content = default(text)
        return _renamed(content) if any(name in text for name in MOVED) else content

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def _renamed(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _renamed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_renamed(value) for value in content]
    for before, now in MOVED.items():
        if isinstance(content, str) and content.startswith(before):
            return now + content.removeprefix(before)
    return content
