"""The one error that a user can cause, and the text of others."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class QatError(ValueError):
    """Bad input: a message of one line that names the place, the value and the way out. The command line prints it."""


def bad_input(error: BaseException) -> BaseException | None:
    """The error to show in one line, or None for a defect of the program.

    Where jsonargparse could not build a class, that is the error which the class raised.
    """
    if not isinstance(error, ValueError) or isinstance(error, QatError):
        return error
    if not str(error).startswith("Does not validate"):
        return None
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return cause
