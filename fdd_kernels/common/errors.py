"""The errors that a command shows as one line, without a traceback."""


class UserError(Exception):
    """Something that the user can put right: a missing file, a corrupt line, options that do not go
    together.

    Attributes:
        exit_status: what the command ends with.
    """

    exit_status = 2


class RunStopped(UserError):
    """A run that began as it should and cannot be brought to a good end: its loss is no number."""

    exit_status = 1


class SaidElsewhere(UserError):
    """One that another process of the same run says."""

    def __init__(self, exit_status: int = UserError.exit_status) -> None:
        self.exit_status = exit_status
