"""Errors that a command shows as one line, without a traceback."""


class UserError(Exception):
    """An error that the user can fix: a missing file, a corrupt line, options that do not go
    together.

    Attributes:
        exit_status: the exit code of the command.
    """

    exit_status = 2


class RunStopped(UserError):
    """A run that started correctly but cannot finish: its loss is not finite."""

    exit_status = 1


class SaidElsewhere(UserError):
    """An error that another process of the same run shows."""

    def __init__(self, exit_status: int = UserError.exit_status) -> None:
        self.exit_status = exit_status
