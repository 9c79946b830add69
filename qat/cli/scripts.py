"""What the programs of the folder tools/ share: they end as `qat` does, with one line for bad input and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from qat.errors import QatError, first_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are QatErrors; argparse itself prints its whole usage before each."""

    def error(self, message: str) -> NoReturn:
        """QatError for a wrong command line."""
        raise QatError(f"{message}; {self.prog} --help lists the options")


def run_script(
    parser: Parser, work: Callable[[argparse.Namespace], int | None], arguments: Sequence[str] | None = None
) -> int:
    """Do the work of a program.

    Args:
        parser: reads its command line.
        work: what is done with the options; it may return an exit code.
        arguments: the command line; that of the process when None.

    Returns:
        The exit code: 0, or 2 for bad input, or 130 after Ctrl-C, each with one line on stderr; or that of ``work``.
    """
    try:
        return work(parser.parse_args(arguments)) or 0
    except QatError as error:
        message, code = f"error: {' '.join(str(error).split())}", 2
    except OSError as error:  # a full disk, or a folder that cannot be written
        message, code = f"error: {first_line(error)}", 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    print(f"{parser.prog}: {message}", file=sys.stderr)
    return code
