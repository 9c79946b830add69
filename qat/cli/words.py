"""The words of a command line, before a parser reads them: options and their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CONFIG = ("-c", "--config")


def options_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every option as it is written, with what stands after it: behind ``=``, or the next word, empty at the end."""
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("-"):
            yield flag, value if equals else after


def last_value(words: Sequence[str], flag: str) -> str:
    """The value that counts of an option that may be given several times; empty where it has none."""
    values = [value for name, value in options_in(words) if name == flag]
    return values[-1] if values else ""


def given_configs(words: Sequence[str]) -> list[str]:
    """The config files that a command names."""
    return [value for flag, value in options_in(words) if flag in CONFIG]


def words_of_model(words: Sequence[str]) -> list[str]:
    """The configs and the options of the model that a command names, in their order: they describe its model."""
    kept = (*CONFIG, "--trust")
    return [word for pair in options_in(words) if pair[0] in kept or pair[0].startswith("--model.") for word in pair]


def says_trust(words: Sequence[str]) -> bool:
    """Whether a command line has ``--trust true``."""
    return last_value(words, "--trust").lower() in ("true", "yes", "on")
