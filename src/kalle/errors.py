"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake that the user can correct: the message names the value got, what was expected, and the remedy.

    The command line prints it on one line and leaves with exit code 2; the library raises it as the
    ``ValueError`` it is. A broken invariant of our own is an ``assert`` instead.
    """
