"""The errors that a command shows as one line, without a traceback."""


class UserError(Exception):
    """Something that the user can put right: a missing file, a corrupt line, options that do not go together."""


class SaidElsewhere(UserError):
    """The same, where another process of the run says it."""
