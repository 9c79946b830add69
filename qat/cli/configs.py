"""Config files as they are written: with configs that they start from, and with names that classes had before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from qat.cli.config_file import SECTIONS, check_trusted, is_loaded, read_config
from qat.cli.words import CONFIG, given_configs, options_in, says_trust
from qat.errors import QatError

MOVED = {"qat.regularizers.": "qat.training.regularizers."}  # class paths that older runs wrote into their config.yaml


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, where every config is preceded by those that its key ``base`` names.

    Raises:
        QatError: a file that is no config, is its own base, or names classes that nobody trusts; ``--base`` on the
            command line.
    """
    found: list[str] = []
    trust = says_trust(arguments)
    _check_other_files(arguments, trust)
    _check_short_flags(arguments)
    words = iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--base":
            raise QatError("base stands inside a config; on the command line, give --config once for each file")
        if flag.startswith("--co") and "--config".startswith(flag) and flag != "--config":
            raise QatError(f"{flag} is short for --config: write it out")  # the parser would read it without its base
        if flag not in CONFIG:
            found.append(word)
            continue
        value = value or next(words, "")
        if not value or value.startswith("--"):
            raise QatError("--config stands without a value: give the path of a YAML file after it")
        for file in [*_bases(path := Path(value).expanduser(), (), trust), path]:
            found += ["--config", str(file)]
    return found


def _check_short_flags(arguments: Sequence[str]) -> None:
    """Refuse ``-cFILE``, which the parser would read as a config that nobody has checked."""
    for word in arguments:
        if word.startswith("-c") and word.partition("=")[0] not in CONFIG:
            raise QatError(f"{word} gives a config without a space: write --config {word.removeprefix('-c')}")


def _check_other_files(arguments: Sequence[str], trust: bool) -> None:
    """Refuse files that the parser would read beside those of ``--config``."""
    for flag, value in options_in(arguments):
        option = flag.removeprefix("--")
        if flag.startswith("--") and option in SECTIONS:
            raise QatError(f"{flag} is a group of options: give each as {flag}.NAME VALUE, or write them in a --config")
        if flag.startswith("--") and not trust and is_loaded(option, value):
            raise QatError(f"{flag} is the file {value}: write what it says into a --config, or give --trust true")


def check_configs(arguments: Sequence[str]) -> None:
    """Check the config files that a command names, of a verb whose configs have no bases."""
    _check_short_flags(arguments)
    for path in given_configs(arguments):
        if not path or path.startswith("--"):
            raise QatError("--config stands without a value: give the path of a YAML file after it")
        check_trusted(Path(path), read_config(Path(path)))


def _bases(path: Path, inside: tuple[Path, ...], trust: bool) -> list[Path]:
    """The files that a config starts from, the farthest first; each is checked."""
    if path.resolve() in inside:
        raise QatError(f"config {path} is its own base: {' -> '.join(map(str, (*inside, path)))}")
    content = read_config(path)
    if not trust:
        check_trusted(path, content)
    named = content.get("base")
    names = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in names):
        raise QatError(f"config {path}: base is {named}: give the path of a config, or a list of paths")
    bases = [path.parent / Path(name).expanduser() for name in names]
    for base in bases:
        if not base.is_file():
            raise QatError(f"config {path}: there is no base {base}")
    return [file for base in bases for file in (*_bases(base, (*inside, path.resolve()), trust), base)]


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
