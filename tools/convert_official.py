"""The same as `qat convert-official`: official DeiT, Swin, SReT and VVTQ checkpoints to files that qat reads."""

from __future__ import annotations

import sys

from qat.cli import main as qat


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when it succeeded, 2 with one line on stderr for bad input."""
    return qat(["convert-official", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
