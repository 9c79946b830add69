"""The same as `qat make-softlabels`: labels of many crops of every training image, made by a teacher."""

from __future__ import annotations

import sys

from qat.cli import main as qat


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when it succeeded, 2 with one line on stderr for bad input."""
    return qat(["make-softlabels", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
