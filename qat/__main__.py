"""`python -m qat` and `torchrun -m qat`: the same as the command `qat`."""

from qat.cli import console

console()
