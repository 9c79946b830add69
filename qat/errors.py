"""The one error that a user can cause, and the text of others."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class QatError(ValueError):
    """Bad input: a message of one line that names the place, the value and the way out. The command line prints it."""
