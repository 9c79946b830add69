"""Soft labels of many crops of every training image, made by a timm teacher, in one HDF5 file (docs/softlabels.md).

python tools/make_softlabels.py --data.root /path/to/imagenet --teacher tf_efficientnet_l2.ns_jft_in1k_475
       --crops 500 --topk 5 --out labels.h5

A run that was stopped goes on when it is started again with the same options.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError

from jsonargparse import ArgumentParser

from qat.cli import set_up_logging
from qat.errors import QatError, bad_input
from qat.labeling import make_softlabels
from qat.labelplan import Options


def read(arguments: list[str] | None) -> Options:
    """The options of a command line and of the YAML files that it names."""
    parser = ArgumentParser(prog="make_softlabels", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; later options win.")
    parser.add_class_arguments(Options, as_group=False)
    values = parser.instantiate(parser.parse_args(arguments))
    return Options(**{name: value for name, value in values.items() if name != "config"})


def main(arguments: list[str] | None = None) -> int:
    """Make the labels; 0 when that succeeded, 2 with one line on stderr for bad input."""
    set_up_logging()
    try:
        make_softlabels(read(arguments))
    except (QatError, ArgumentError, ValueError) as error:
        if (bad := bad_input(error)) is None:
            raise
        print(f"make_softlabels: error: {' '.join(str(bad).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
