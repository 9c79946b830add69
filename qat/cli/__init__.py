"""The command line."""

from qat.cli.main import console, main, run

__all__ = ["console", "main", "run"]
