"""The one error that a user can cause."""


class QatError(ValueError):
    """Bad input: a message of one line that names the place, the value and the way out. The command line prints it."""
