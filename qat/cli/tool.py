"""What the programs in tools/ share: options from a dataclass, errors in one line."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from qat.cli.main import set_up_logging
from qat.errors import QatError, bad_input, first_line

Options = TypeVar("Options")


def run_tool(
    name: str,
    description: str | None,
    options: Callable[..., Options],
    work: Callable[[Options], None],
    arguments: Sequence[str] | None = None,
    **positional: str,
) -> int:
    """Do ``work`` with the options of a command line, or of YAML files that it names.

    Args:
        name: of the program.
        description: for its help.
        options: dataclass of what can be given; its docstring is the help.
        work: what is done with them.
        arguments: of the command line, the process's own when None.
        positional: paths that are given without a name, and their help.

    Returns:
        0 when that succeeded, 2 with one line on stderr for bad input.
    """
    set_up_logging()
    parser = ArgumentParser(prog=name, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; later options win.")
    for word, text in positional.items():
        parser.add_argument(word, metavar=word.upper(), type=Path, help=text)
    parser.add_class_arguments(options, as_group=False, skip=set(positional))
    try:
        values: Any = parser.instantiate(parser.parse_args(arguments))
        work(options(**{key: value for key, value in values.items() if key != "config"}))
    except (QatError, ArgumentError, ValueError) as error:
        if (bad := bad_input(error)) is None:
            raise
        print(f"{name}: error: {' '.join(str(bad).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, above all
        print(f"{name}: error: {first_line(error)}; what is finished is kept", file=sys.stderr)
        return 2
    return 0
