"""`python -m qat` and `torchrun -m qat`: the same as the command `qat`."""

from qat.cli.main import console

if __name__ == "__main__":
    console()
