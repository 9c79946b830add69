"""The one error that a user can cause, and the text of others."""

import errno

OF_THE_SYSTEM = {  # what a user can change: space and permissions
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EIO,
}  # fmt: skip

UNREADABLE = (  # what yaml raises, beside YAMLError, for values that are none of their type, and for deep nesting
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return (str(error).splitlines() or [type(error).__name__])[0]


class QatError(ValueError):
    """Bad input: a message of one line that names the place, the value and the way out. The command line prints it."""


def bad_input(error: BaseException) -> BaseException | None:
    """The error to show in one line, or None for a defect of the program.

    Where jsonargparse could not build a class, that is the error which the class raised.
    """
    if isinstance(error, OSError):
        return _in_words(error) if error.errno in OF_THE_SYSTEM else None
    if not isinstance(error, ValueError) or isinstance(error, QatError):
        return error
    if not str(error).startswith("Does not validate"):
        return None
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return cause


def _in_words(error: OSError) -> OSError:
    """An error of the operating system, in its own words, with the file where it is known."""
    where = f": {error.filename}" if error.filename else ""
    return OSError(f"{error.strerror}{where}")
