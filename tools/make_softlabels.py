"""Soft labels of many crops of every training image, made by a timm teacher, in one HDF5 file (docs/softlabels.md).

python tools/make_softlabels.py --data.root /path/to/imagenet --teacher tf_efficientnet_l2.ns_jft_in1k_475
       --crops 500 --topk 5 --out labels.h5

A run that was stopped goes on when it is started again with the same options.
"""

from __future__ import annotations

import sys

from qat.cli.tool import run_tool
from qat.labeling.make import make_softlabels
from qat.labeling.plan import Options


def main(arguments: list[str] | None = None) -> int:
    """Make the labels; 0 when that succeeded, 2 with one line on stderr for bad input."""
    return run_tool("make_softlabels", __doc__, Options, make_softlabels, arguments)


if __name__ == "__main__":
    sys.exit(main())
